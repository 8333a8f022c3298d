#!/bin/bash
# Tests the native code under sanitizers, and on another processor. Usage: tests/native/run.sh
# [address|thread|python|aarch64|fuzz]..., the first four by default.
#   address  runs COUNT random problems through every C++ entry point, and as many through the emulation of the CUDA
#            kernels, under AddressSanitizer and UndefinedBehaviorSanitizer
#   thread   runs RACES problems each through the CPU engine with several callers, and through the CUDA kernels with a
#            host thread for each thread of a block, under ThreadSanitizer
#   python   runs the suite's tests of native code in a package built as for `address`
#   aarch64  runs a few problems and the look-up of the OpenMP runtime, cross-compiled and emulated. It says so and is
#            skipped without aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)
#   fuzz     as `address`, with libFuzzer, which coverage guides: MINUTES for each program; CXX must be a Clang
# Each sanitizer must first find a planted defect. SEED is the first problem's; PYTHON and CXX choose the interpreter
# and the compiler. The extensions that lie in the tree stay as they are.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
export CXX=${CXX:-c++}
export KTO_KERNELS_WERROR=1 KTO_KERNELS_CUDA=0 KTO_KERNELS_CUDA_EMULATION=1
export ASAN_OPTIONS=abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 TSAN_OPTIONS=halt_on_error=1
[ $# -gt 0 ] || set -- address thread python aarch64
native=tests/native

# build SANITIZERS: builds the package in build/sanitized-FIRST, and lists the objects of its extensions.
build() {
    local name=${1%%,*} output
    output=$(KTO_KERNELS_SANITIZE=$1 $PYTHON setup.py --quiet build --build-lib "build/sanitized-$name" 2>&1) ||
        { echo "$output"; exit 1; }
    objects=build/$($PYTHON -c 'import sys; print(sys.implementation.cache_tag)')-$name
    cpu=$(ls "$objects"/kto_kernels._cpu/{engine,stages,kernels_*}.o)
    cuda=$objects/kto_kernels._cuda_emulation/emulation.o
}

# program NAME SANITIZERS SOURCES AND OBJECTS...: links a test program.
program() {
    local name=$1 sanitizers=$2
    shift 2
    $CXX -std=c++20 -g -O1 -Wall -Wextra -Werror -pthread ${sanitizers:+-fsanitize="$sanitizers" -fno-sanitize-recover=all} "$@" \
        -ldl -o "$objects/$name"
}

# finds DEFECT MESSAGE PROGRAM: checks that PROGRAM fails with MESSAGE where DEFECT is planted.
finds() {
    local output
    output=$(PLANT=$1 "$objects/$3" 2>&1) && { echo "$3 did not find a planted $1"; exit 1; }
    grep -q "$2" <<< "$output" || { echo "$output"; exit 1; }
}

for what in "$@"; do
    echo "== $what"
    case $what in
    address)
        build address,undefined
        program fuzz_cpu address,undefined $native/fuzz_cpu.cpp $native/main.cpp $cpu
        program fuzz_cuda address,undefined $native/fuzz_cuda.cpp $native/main.cpp $cuda
        for name in fuzz_cpu fuzz_cuda; do
            finds overflow heap-buffer-overflow $name
            finds undefined "signed integer overflow" $name
            "$objects/$name" "${COUNT:-20000}" "${SEED:-1}"
        done
        ;;
    thread)
        build thread
        program races_cpu thread $native/races_cpu.cpp $native/main.cpp $cpu
        program races_cuda thread $native/fuzz_cuda.cpp $native/launch_threads.cpp $native/main.cpp
        for name in races_cpu races_cuda; do
            finds race "data race" $name
            "$objects/$name" "${RACES:-12}" "${SEED:-1}"
        done
        ;;
    python)
        build address,undefined
        # Python is not built with the sanitizers, so that their runtimes must be preloaded; and Python itself leaks.
        preload=""
        for library in libasan libubsan libstdc++; do preload+=" $($CXX -print-file-name=$library.so)"; done
        sanitized=(env LD_PRELOAD="${preload# }" ASAN_OPTIONS=detect_leaks=0
            PYTHONPATH="$PWD/build/sanitized-address" "$PYTHON" -P)
        "${sanitized[@]}" -c 'import kto_kernels._cpu as c, kto_kernels._cuda_emulation as e
assert all("/sanitized-address/" in module.__file__ for module in (c, e))'
        # The two tests that start nvcc are left out, as nvcc fails under the preload.
        "${sanitized[@]}" -m pytest -q -n 2 -p no:cacheprovider -m "not alone and not gpu" -k "not triton" \
            --deselect tests/backends/test_cuda.py::test_no_kernel_spills_or_uses_local_memory \
            --deselect tests/backends/test_cuda.py::test_bf16_kernels_move_vectors_of_16_bytes \
            tests/backends/test_{cpu,cuda,chunk}.py tests/losses/test_{kto_loss,layouts,numerics,logit_scale}.py
        ;;
    aarch64)
        cross=aarch64-linux-gnu-g++
        if ! { command -v $cross && command -v qemu-aarch64; } > /dev/null; then
            echo "skipped: no $cross or no qemu-aarch64"
            continue
        fi
        objects=build/aarch64
        mkdir -p $objects
        for source in engine stages kernels; do
            $cross -std=c++20 -O1 -Wall -Wextra -Werror -pthread -DKTO_ISA=baseline -DKTO_VECTOR_BYTES=16 \
                -c csrc/cpu/$source.cpp -o $objects/$source.o
        done
        CXX=$cross program fuzz_cpu "" $native/fuzz_cpu.cpp $native/main.cpp $objects/{engine,stages,kernels}.o
        $cross -shared -fPIC -fopenmp -x c++ -o $objects/libtorch_alone.so - <<< '
            void torch_alone(double* x) {
            #pragma omp parallel for
                for (int i = 0; i < 8; ++i) x[i] = i;
            }'
        CXX=$cross program team "" $native/team.cpp $objects/{stages,kernels}.o
        emulated=(qemu-aarch64 -L /usr/aarch64-linux-gnu)
        "${emulated[@]}" $objects/team "$PWD/$objects/libtorch_alone.so"
        "${emulated[@]}" $objects/fuzz_cpu 300 "${SEED:-1}"
        ;;
    fuzz)
        build fuzzer-no-link,address,undefined
        program fuzz_cpu fuzzer,address,undefined $native/fuzz_cpu.cpp $cpu
        program fuzz_cuda fuzzer,address,undefined $native/fuzz_cuda.cpp $cuda
        for name in fuzz_cpu fuzz_cuda; do
            mkdir -p "build/corpus/$name"
            "$objects/$name" -max_total_time=$((60 * ${MINUTES:-5})) -max_len=64 -print_final_stats=1 \
                -artifact_prefix=build/corpus/ "build/corpus/$name"
        done
        ;;
    *)
        echo "unknown: $what"
        exit 2
        ;;
    esac
done
