#!/bin/sh
# The lab table. Start it again after a stop, and it goes on where it was.
#   benchmarks/lab/lab.sh DATA OUT [methods|ablations] [more options of afds compare]
# DATA holds caltech101/, flowers12/ and weights/resnet18_imagenet.safetensors.
set -eu
data=$1; out=$2; table=${3:-methods}; [ $# -ge 3 ] && shift 3 || shift 2
here=$(dirname "$0")
afds=${AFDS:-.venv/bin/afds}
python=${PYTHON:-.venv/bin/python}
test -d lab-data/caltech30 || $python "$here/subset.py" "$data/caltech101" lab-data/caltech30 --classes 30
test -d lab-data/source-half || $python "$here/subset.py" "$data/caltech101" lab-data/source-half --half 0
test -d lab-data/target-half || $python "$here/subset.py" "$data/caltech101" lab-data/target-half --half 1
case $table in
  methods) sets="lab-data/caltech30 $data/flowers12" ;;
  ablations) sets="lab-data/target-half" ;;
  *) echo "the third word is methods or ablations" >&2; exit 2 ;;
esac
# shellcheck disable=SC2086
exec "$afds" compare $sets --rows "$here/$table.toml" --methods "" --out "$out/$table" \
  --budgets 1x,2x,5x,10x --seeds 3 --epochs 12 --base-epochs 12 --trials 2 --tune-at 5x --reference afds \
  --source "resnet18:$data/weights/resnet18_imagenet.safetensors" \
  --data-options.input-size 96 --optim.batch-size 32 "$@"
