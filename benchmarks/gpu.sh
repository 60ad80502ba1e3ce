#!/usr/bin/env bash
# Everything that wants a GPU, in two calls whose limits add up to 560 s each; the tables come last.
#
#   benchmarks/gpu.sh            tests, and supervised training
#   benchmarks/gpu.sh selfsup    DINO, I-JEPA and H-JEPA
#
#   PYTHON           interpreter with the packages        [python3]
#   OUT              where logs and the run are written   [runs/gpu]
#   OPSIN_TEST_DATA  folder with cifar10/*.parquet        [../shared/data]
set -uo pipefail
cd "$(dirname "$0")/.."

part=${1:-supervised}
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}/$part
data=${OPSIN_TEST_DATA:-../shared/data}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
rm -f "$out"/*.log
failed=0

# section NAME SECONDS COMMAND...: run with a time limit, keep the whole output, go on after a failure.
section() {
    local name=$1 limit=$2
    shift 2
    echo "== $name (at most $limit s)"
    SECONDS=0
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    # Status 3 is a training that its time limit ended: as planned.
    if [ $status -ne 0 ] && ! { [[ "$*" == *limits.hours=* ]] && [ $status -eq 3 ]; }; then
        failed=1
        echo "   failed with status $status:"
        tail -n 15 "$out/$name.log"
    fi
    echo "   $SECONDS s, $out/$name.log"
}

# training RECIPE LIMIT HOURS: a run that its time limit ends, and its scores.
training() {
    local recipe=$1
    if [ ! -d "$data/cifar10" ]; then
        echo "== $recipe: skipped, no $data/cifar10; set OPSIN_TEST_DATA"
        return
    fi
    section "$recipe" "$2" "$python" -m opsin train "$recipe" data.path="$data/cifar10" \
        limits.hours="$3" --out "$out/$recipe-run" --fresh
    section "$recipe-scores" 40 "$python" -m opsin eval "$out/$recipe-run"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || exit 1

case $part in
supervised)
    section tests 110 "$python" -m pytest -m gpu -q -p no:cacheprovider
    section steps 170 "$python" benchmarks/gpu_steps.py
    section steps-compiled 100 "$python" benchmarks/gpu_steps.py --formats bf16 --compile --rounds 3
    training cifar10-vit-strong 140 0.03
    ;;
selfsup)
    raced=("published, fp32, as installed" "published, bf16" "opsin, fp32" "opsin, bf16")
    section dino-steps 120 "$python" benchmarks/dino_step.py --device cuda --work s16 --batch 64 --steps 5 --rounds 3 \
        --only "${raced[@]}"
    section jepa-steps 120 "$python" benchmarks/jepa_step.py --device cuda --work s16 --batch 256 --steps 5 --rounds 3 \
        --only "${raced[@]}" "opsin, bf16, unbiased" "opsin, bf16, H-JEPA with 2 levels"
    training dino-cifar10 120 0.025
    training ijepa-cifar10 120 0.025
    ;;
*)
    echo "unknown part '$part'; known: supervised, selfsup"
    exit 2
    ;;
esac

for log in "$out"/*.log; do
    printf '\n--- %s\n' "$(basename "$log" .log)"
    tail -n 16 "$log"
done
# The curve and the state are what comes back: the checkpoints are large.
rm -rf "$out"/*-run/checkpoints
exit $failed
