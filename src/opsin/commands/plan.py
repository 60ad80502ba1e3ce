"""`opsin plan`: how long a recipe takes and what it needs, without training."""

import argparse
import json
from pathlib import Path

from opsin.commands.arguments import Commands, path, signals_interrupt, take_recipe


def add_commands(commands: Commands) -> None:
    """Add `plan`."""
    plan = commands.add_parser("plan", help="say how long a recipe takes and what it needs, without training")
    take_recipe(plan)
    plan.add_argument("--write", type=path, metavar="FILE", help="write the recipe with all that was chosen")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=_plan)


@signals_interrupt()
def _plan(arguments: argparse.Namespace) -> None:
    from opsin.reporting.teller import CommandTeller
    from opsin.run.choice import choose
    from opsin.run.plan import plan_run
    from opsin.settings.text import to_yaml
    from opsin.storage.files import write_atomic, writing

    target: Path | None = arguments.write
    recipe = choose(arguments.recipe, arguments.overrides, None, CommandTeller())
    if target is not None:
        with writing(target, "choose another --write"):
            write_atomic(target, to_yaml(recipe, comments=True).encode())
    plan = plan_run(recipe, CommandTeller())
    print(json.dumps(plan.as_dict()) if arguments.json else "\n".join(plan.lines()))
