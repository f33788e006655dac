#!/usr/bin/env bash
# The 224 px speed figures of the README and the docs again, on this machine: about twenty minutes, which must be idle.
# (Those of trained runs, in docs/deploy.md, are `afds measure` of a run.)
#
#   benchmarks/speed/figures.sh OUT          OUT/runtime.jsonl, OUT/folders/*/measure.json, OUT/*.txt, OUT/figures.md
#
# Two parts for each number of threads, one and all: the native runtime beside dense ONNX Runtime and OpenVINO in one
# process (runtime.py, float32 and bf16), and run folders through `afds measure` in all runtimes (speed.py); then
# loading and memory. A part that has finished is not done again.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: benchmarks/speed/figures.sh OUT" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
networks=${NETWORKS:-"resnet18 resnet50 resnet101"}
mkdir -p "$1"
out=$(cd "$1" && pwd)
cores=$(nproc)
export OMP_WAIT_POLICY=PASSIVE

part() { # NAME COMMAND...: once, its output kept
    local name=$1
    shift
    [ -e "$out/$name.done" ] && return
    echo "$name: $*"
    "$@" | tee "$out/$name.txt"
    touch "$out/$name.done"
}

for threads in 1 $([ "$cores" -gt 1 ] && echo "$cores"); do
    for network in $networks; do
        rm -f "$out/runtime-$network-$threads.part"
        [ -e "$out/runtime-$network-$threads.done" ] ||
            OMP_NUM_THREADS=$threads part "runtime-$network-$threads" taskset -c "0-$((threads - 1))" "$python" \
                "$here/runtime.py" --archs "$network" --threads "$threads" --precisions float32 bf16 \
                --isas "${ISAS:-auto}" --seconds "${SECONDS_EACH:-12}" --json "$out/runtime-$network-$threads.part"
        [ ! -e "$out/runtime-$network-$threads.part" ] ||
            mv "$out/runtime-$network-$threads.part" "$out/runtime-$network-$threads.jsonl"
    done
done
cat "$out"/runtime-*.jsonl > "$out/runtime.jsonl"
# shellcheck disable=SC2086
part folders "$python" "$here/speed.py" --networks $networks --kinds cheap settled learned --threads 1 "$cores" --out "$out/folders" \
    --only native onnx openvino --rounds "${ROUNDS:-10}"
for network in ${LOADED:-resnet50}; do
    part "loading-$network" "$python" "$here/loading.py" --arch "$network"
done
"$python" "$here/table.py" "$out" "$out/figures.md"
echo "tables: $out/figures.md"
