#!/usr/bin/env bash
# Runs one small test of every kernel under the tools of compute-sanitizer, many at a time, and prints a line for each.
#
#     bash benchmarks/kernels/sanitize.sh [log folder] [tools]
#
# Needs a GPU, compute-sanitizer, pytest. Ends with 1 if any run found something of ours, failed or was not done in time;
# sanitizer_findings.py says what is left out.
set -u
cd "$(dirname "$0")/../.."
logs=${1:-${TMPDIR:-/tmp}/sanitize}
tools=${2:-"memcheck racecheck synccheck initcheck"}
jobs=${JOBS:-16} limit=${LIMIT:-60}
mkdir -p "$logs"
export PYTHONPATH=kernels:. OMP_NUM_THREADS=1
python=${PYTHON:-python3}
pytest=("$python" -m pytest -q -p no:cacheprovider)

# Name | test file | which tests of it. The slow ones come first.
kernels='
prefill-hopper|prefill_attention|blocks_of_128 and 4-128-dtype0
shared-prefix-hopper|shared_prefix_attention|larger_than_a_query_block
decode-hopper|decode_attention|half_precision and 3-context_lens0
linear-hopper|linear|test_linear and 512-dtype1
linear-silu-hopper|linear_silu_and_multiply|few_programs
linear-triton|linear|test_linear and 130-72-200-dtype0
prefill-triton|prefill_attention|chunks_over_cached_prefixes
shared-prefix-triton|shared_prefix_attention|7-64-32
decode-triton|decode_attention|programs[3-True]
sampling|sampling|mixes_greedy_and_drawn_rows
greedy|sampling|first_of_the_largest
logprobs|logprobs|63-1-dtype0
silu-and-multiply|silu_and_multiply|63-100-dtype0
silu-chunks|linear_silu_and_multiply|wide_row
rms-norm|rms_norm|63-64-dtype0 or 17-96-dtype0
rotary|rotary_and_store_kv|1-9-3-64-16-dtype0
copy-blocks|copy_blocks|16-64'

check() {
    local tool=$1 name=$2 file=$3 expression=$4 log summary
    log=$logs/$tool-$name.log
    # Only what is allocated on its own has bounds that the tools know.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$limit" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        --print-limit 50 "${pytest[@]}" "tests/kernels/test_$file.py" -k "$expression" >"$log" 2>&1
    local status=$? note=
    if [ $status = 9 ] && "$python" benchmarks/kernels/sanitizer_findings.py "$log" >>"$log.ours"; then
        status=0 note=", findings in others' code"
    fi
    summary=$(grep -hoE '(ERROR|RACECHECK) SUMMARY: .*' "$log" | tail -1)
    echo "$tool $name: $([ $status = 0 ] && echo "clean$note" || echo "EXIT $status") | ${summary:-no summary} |" \
        "$(grep -hoE '[0-9]+ (passed|failed)[^=]*' "$log" | tail -1)"
    return $status
}

# Compiled kernels are kept on disk, so compile without the tools.
warm() { "${pytest[@]}" "tests/kernels/test_$2.py" -k "$3" >"$logs/warm-$1.log" 2>&1 || echo "without tools $1: FAILS"; }

export -f check warm
export logs limit python
export pytest_words="${pytest[*]}"
# Functions of child shells know no arrays of this one.
run='read -ra pytest <<<"$pytest_words"; "$@"'
grep '|' <<<"$kernels" | while IFS='|' read -r name file expression; do
    printf '%s\0' warm "$name" "$file" "$expression"
done | xargs -0 -n 4 -P "$jobs" bash -c "$run" _
for tool in $tools; do
    grep '|' <<<"$kernels" | while IFS='|' read -r name file expression; do
        printf '%s\0' check "$tool" "$name" "$file" "$expression"
    done
done | xargs -0 -n 5 -P "$jobs" bash -c "$run" _ | tee "$logs/summary.txt"
! grep -qvE ': clean(,| )' "$logs/summary.txt"
