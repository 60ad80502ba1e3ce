"""`opsin recipes` and `opsin schema`: the language of recipes."""

import argparse
import json
from pathlib import Path

from opsin.commands.arguments import Commands, take_recipe


def add_commands(commands: Commands) -> None:
    """Add `recipes` and `schema`."""
    recipes = commands.add_parser("recipes", help="list the shipped recipes, or show one with all its keys")
    actions = recipes.add_subparsers(dest="action", metavar="show")
    show = actions.add_parser("show", help="print the whole effective recipe, with a comment for each key")
    take_recipe(show)
    show.set_defaults(run=_show)
    recipes.set_defaults(run=_recipes)
    schema = commands.add_parser("schema", help="print the JSON schema of recipes, for editors")
    schema.set_defaults(run=_schema)


def _recipes(arguments: argparse.Namespace) -> None:
    from opsin.settings.text import shipped_recipes

    found = shipped_recipes(Path(__file__).parent.parent / "recipes")
    width = max(map(len, found))
    for name, text in found.items():
        print(f"{name:{width}}  {text}")


def _show(arguments: argparse.Namespace) -> None:
    from opsin.run.recipe import read_draft
    from opsin.settings.text import to_yaml

    print(to_yaml(read_draft(arguments.recipe, arguments.overrides), comments=True), end="")


def _schema(arguments: argparse.Namespace) -> None:
    from opsin.run.recipe import Draft
    from opsin.settings.extensions import import_extensions
    from opsin.settings.text import json_schema

    import_extensions()
    print(json.dumps(json_schema(Draft), indent=2))
