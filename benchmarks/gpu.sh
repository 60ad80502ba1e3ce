#!/usr/bin/env bash
# Everything that wants a GPU, in one call whose limits add up to 560 s; the tables come last.
#
#   benchmarks/gpu.sh
#
#   PYTHON           interpreter with the packages        [python3]
#   OUT              where logs and the run are written   [runs/gpu]
#   OPSIN_TEST_DATA  folder with cifar10/*.parquet        [../shared/data]
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
data=${OPSIN_TEST_DATA:-../shared/data}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
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
    if [ $status -ne 0 ] && ! { [ "$name" = cifar10 ] && [ $status -eq 3 ]; }; then
        failed=1
        echo "   failed with status $status:"
        tail -n 15 "$out/$name.log"
    fi
    echo "   $SECONDS s, $out/$name.log"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || exit 1

section tests 110 "$python" -m pytest -m gpu -q -p no:cacheprovider
section steps 170 "$python" benchmarks/gpu_steps.py
section steps-compiled 100 "$python" benchmarks/gpu_steps.py --formats bf16 --compile --rounds 3
if [ -d "$data/cifar10" ]; then
    section cifar10 140 "$python" -m opsin train cifar10-vit-strong data.path="$data/cifar10" \
        limits.hours=0.03 --out "$out/cifar10-run" --fresh
    section cifar10-scores 40 "$python" -m opsin eval "$out/cifar10-run"
else
    echo "== cifar10: skipped, no $data/cifar10; set OPSIN_TEST_DATA"
fi

for name in tests steps steps-compiled cifar10 cifar10-scores; do
    [ -f "$out/$name.log" ] || continue
    printf '\n--- %s\n' "$name"
    tail -n 16 "$out/$name.log"
done
# The curve and the state are what comes back: the checkpoints are large.
rm -rf "$out/cifar10-run/checkpoints"
exit $failed
