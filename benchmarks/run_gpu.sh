#!/usr/bin/env bash
# The first hour on a GPU, in three parts of at most nine minutes and a half each. docs/first-run.md explains them.
#
#   benchmarks/run_gpu.sh [tests|benchmarks|table|all] [OUT] [options of every benchmark, such as: --quick --device cpu]
#
# tests: correctness of each backend, then NVIDIA's compute-sanitizer. benchmarks: a small gate, then the most valuable
# results first. table: what was predicted, beside what OUT has. Everything goes into the folder OUT (default:
# benchmarks/results): PART.log, tests-*.xml, COMMAND-DEVICE.json, predictions-DEVICE.md, and first-run.tar.gz of them
# all. A step that is cut off leaves what it had. The exit status is 1 where a step failed or did not end in time, and 2
# where nothing could begin.
set -uo pipefail
usage() {
  [ $# -eq 0 ] || echo "run_gpu.sh: $*" >&2
  sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}
parts=(tests benchmarks table)
case ${1:-all} in
  tests | benchmarks | table) parts=("$1") ;;
  all) ;;
  -h | --help) usage ;;
  *) usage "$1: expected tests, benchmarks, table or all" ;;
esac
shift || true
case ${1:-} in
  -*) usage "$1: options come behind the folder OUT" ;;
  "") out=$(dirname "${BASH_SOURCE[0]}")/results ;;
  *) out=$1 ;;
esac
shift || true
slower=${RUN_GPU_SLOWER:-1} # all limits times this: for a trial on a busy CPU
[[ $slower =~ ^[1-9][0-9]*$ ]] || usage "RUN_GPU_SLOWER: expected a whole number from 1 on, got $slower"
out=$(realpath -m -- "$out") && mkdir -p -- "$out" || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
device=cuda
for ((i = 1; i < $#; i++)); do
  if [ "${!i}" = --device ]; then j=$((i + 1)) && device=${!j}; fi
done
python=${PYTHON:-python}
# Most first runs fail for one of two reasons: a word in a second, instead of a traceback for each step.
[ "$device" != cuda ] || [ "${parts[*]}" = table ] || "$python" -c '
try:
    import torch
except ImportError as error:
    raise SystemExit(f"run_gpu.sh: no PyTorch for this Python ({error}); set PYTHON to the one that has it")
if not torch.cuda.is_available():
    build = "has no CUDA" if torch.version.cuda is None else f"is for CUDA {torch.version.cuda}; see nvidia-smi"
    raise SystemExit(f"run_gpu.sh: PyTorch finds no CUDA device; torch {torch.__version__} {build}")
' || exit 2
gate=$(mktemp)
trap 'rm -f "$gate"' EXIT
failed=()

say() { echo "== $*" | tee -a "$log"; }

# step SECONDS NAME COMMAND...: at most that long, and no longer than what is left of the part.
step() {
  local limit=$(($1 * slower)) name=$2 left=$((deadline - SECONDS)) started=$SECONDS end status
  shift 2
  if [ "$left" -lt 5 ]; then
    say "$name: not run, no time left"
    failed+=("$name")
    return 1
  fi
  limit=$((limit < left ? limit : left))
  say "$name, at most $limit s"
  # An interrupt, after which pytest says what failed and ends its processes; behind that the end of the whole group.
  timeout --signal=KILL "$((limit + 15))" timeout --foreground --signal=INT "$limit" "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  case $status in
    0) end="done" ;;
    124 | 137) end="cut off" ;;
    *) end="failed" ;;
  esac
  say "$name: $end after $((SECONDS - started)) s"
  [ "$status" -eq 0 ] || failed+=("$name")
  return "$status"
}

# Tests ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

# suite SECONDS NAME [options of pytest]: many failures have one cause, an error that the device keeps. Then the rest of
# the process says nothing, but another process begins afresh.
suite() {
  local limit=$1 name=$2
  shift 2
  step "$limit" "tests-$name" "$python" -m pytest -q --maxfail=25 --junitxml "$out/tests-$name.xml" "$@"
}

# sanitize TOOL: the CUDA C++ kernels in a process of their own. Without PyTorch's cache of memory each tensor is an
# allocation of its own, whose ends the tool knows.
sanitize() {
  step 60 "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --target-processes all \
    --error-exitcode 9 "$python" -m pytest -q -x -m gpu -k cuda-cuda tests/package/test_smoke.py tests/backends/test_chunk.py
}

tests() {
  ! command -v nvidia-smi > /dev/null || step 10 device nvidia-smi # its clocks, power limit, and what else runs on it
  step 40 self-test "$python" -m kto_kernels
  local together=(-n 4 -m "gpu and not alone") backend tool
  suite 120 one-of-each "${together[@]}" --short
  [[ " $* " != *" --quick "* ]] || return
  if PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin && command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck initcheck; do sanitize "$tool"; done
  else
    say "sanitizer: skipped, there is no compute-sanitizer, which comes with CUDA's toolkit"
  fi
  for backend in triton cuda; do
    suite 120 "$backend" "${together[@]}" --rest -k "$backend-cuda"
  done
  suite 60 others "${together[@]}" --rest -k "not (torch-cuda or triton-cuda or cuda-cuda)"
  suite 60 alone -m "gpu and alone" --rest
  suite 60 torch "${together[@]}" --rest -k torch-cuda
}

# Benchmarks ───────────────────────────────────────────────────────────────────────────────────────────────────────────

# measure SECONDS COMMAND [options]
measure() {
  local limit=$1 command=$2
  shift 2
  step "$limit" "$command" "$python" -m benchmarks "$command" --json "$out/$command-$device.json" --device "$device" "$@"
}

benchmarks() {
  # The gate: what is wrong is wrong on small shapes too, and then nothing else is worth its time.
  measure 90 linear "$@" --quick --peers naive --json "$gate" || return
  measure 60 logits "$@" --quick --peers naive --json "$gate" || return
  local fast=(--peers naive,scored,trl,liger,liger-scaled,cce,torch,quack,quack-chunked) # compiling the naive one takes too long
  local all=()
  [ -z "${RUN_GPU_PEERS:-}" ] || fast=(--peers "$RUN_GPU_PEERS") all=("${fast[@]}") # for a trial
  measure 130 linear "$@" --shapes llama-3-8b qwen2.5-7b "${fast[@]}"
  measure 60 logits "$@" "${all[@]}"
  measure 110 longcontext "$@" "${fast[@]}"
  measure 80 step "$@"
  measure 60 memory "$@" "${fast[@]}"
  measure 15 ceilings "$@"
  [ "$device" != cuda ] || step 40 launches "$python" -m benchmarks launches --json "$out/launches-cuda.json"
}

# Table ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

table() {
  # The machine code of this compiler; without it, that of benchmarks/results/inspect.json.
  step 400 inspect "$python" -m benchmarks inspect --no-amd --no-cuda --json "$out/inspect-$device.json"
  step 60 predictions "$python" -m benchmarks predictions --results "$out" --device "$device"
}

for part in "${parts[@]}"; do
  log=$out/$part.log
  : > "$log"
  deadline=$((SECONDS + 540 * slower))
  "$part" "$@"
done
files=()
for file in "$out"/{tests,benchmarks,table}.log "$out"/tests-*.xml "$out"/*-"$device".json "$out/predictions-$device.md"; do
  [ ! -f "$file" ] || files+=("${file##*/}")
done
tar -czf "$out/first-run.tar.gz" -C "$out" "${files[@]}" && echo "to send: $out/first-run.tar.gz"
[ ${#failed[@]} -eq 0 ] || say "incomplete: ${failed[*]}"
[ ${#failed[@]} -eq 0 ]
