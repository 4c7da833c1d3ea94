#!/usr/bin/env bash
# Everything that needs a CUDA device: builds causal-conv1d, mamba-ssm and the native core (search trees), runs the tests
# marked gpu, measures both systems and training beside mamba-ssm, and trains a model of 170 million parameters.
#
#   scripts/gpu_checks.sh                  build, test, train, decode
#   scripts/gpu_checks.sh device pair      search and decoding with System 2 on a GPU; baseline_170m beside mamba-ssm
#   scripts/gpu_checks.sh baseline         trains stage 1 for nine minutes; a second call goes on, and ends it
#   scripts/gpu_checks.sh system2          stages 2 to 4 on that, and an answer with its plans
#   scripts/gpu_checks.sh build test       some of it; a stage that is done stays done in its folder
#   scripts/gpu_checks.sh fetch            on a machine with a package index: downloads what a machine without one needs
#   DEVICE=cpu QUICK=1 scripts/gpu_checks.sh device pair baseline system2     the same code without a GPU, tiny
#
# A stage that fails does not stop those after it; the exit status says whether all went well. Each of these lines
# stays under ten minutes: each stage has a limit of its own, and its log is kept.
#
#   PYTHON    interpreter that has torch with CUDA          (default: python3)
#   GPU_DIR   where everything is built and kept            (default: build/gpu)
#   PACKAGES  what fetch downloaded; nothing else is asked  (default: GPU_DIR/packages, if it is there)
#   MAX_JOBS  compilers at the same time                    (default: by cores and memory, 8 at most)
#   OUT       results and logs are copied there as well     (default: nowhere)
#   DATA      shards of text with their tokenizer           (default: made of configs/data/sample.yaml in GPU_DIR)
#   DEVICE    cuda or cpu                                   (default: cuda)
#   QUICK     1: tiny shapes and models, a few steps
# shellcheck disable=SC2329  # the stages are called by name
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

PYTHON=${PYTHON:-python3}
GPU_DIR=${GPU_DIR:-build/gpu}
mkdir -p "$GPU_DIR/results"
GPU_DIR=$(cd "$GPU_DIR" && pwd)
PACKAGES=${PACKAGES:-$GPU_DIR/packages}
SITE=$GPU_DIR/site
RESULTS=$GPU_DIR/results
RUNS=$GPU_DIR/runs
DATA=${DATA:-$GPU_DIR/text}
DEVICE=${DEVICE:-cuda}
QUICK=${QUICK:-0}
CAUSAL_CONV1D=causal-conv1d==1.6.1
MAMBA_SSM=mamba-ssm==2.3.2.post1
# What the benchmark and the tests import, beside torch; installed only where it is missing.
NEEDED=(numpy pydantic pyyaml typer rich safetensors tokenizers einops packaging transformers huggingface_hub
    pytest pytest-timeout hypothesis setuptools wheel ninja cmake nanobind)
use_native() {
    if [ -z "${CRSM_NATIVE_PATH:-}" ] && compgen -G "$GPU_DIR/native/_crsm_native*.so" >/dev/null; then
        export CRSM_NATIVE_PATH=$GPU_DIR/native
    fi
}
use_native
export PYTHONPATH="$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$GPU_DIR/triton}

pip_() { "$PYTHON" -m pip --disable-pip-version-check -q "$@"; }

# Names of NEEDED that cannot be imported.
missing() {
    "$PYTHON" - "${NEEDED[@]}" <<'EOF'
import importlib.metadata, sys
for name in sys.argv[1:]:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(name)
EOF
}

index_options() {
    if [ -d "$PACKAGES" ]; then printf '%s\n' --no-index --find-links "$PACKAGES"; fi
}

fetch() {
    mkdir -p "$PACKAGES"
    local package
    for package in "$CAUSAL_CONV1D" "$MAMBA_SSM"; do download "$package" "$PACKAGES" || return 1; done
    # Everything else as wheels for TARGET_PYTHON (3.12, say), if the other machine's is not this one's.
    local target=()
    if [ -n "${TARGET_PYTHON:-}" ]; then
        target=(--python-version "$TARGET_PYTHON" --implementation cp)
        for glibc in 28 27 17; do target+=(--platform "manylinux_2_${glibc}_x86_64"); done
        target+=(--platform manylinux2014_x86_64)
    fi
    pip_ download --only-binary=:all: "${target[@]}" -d "$PACKAGES" pydantic pyyaml typer rich pytest pytest-timeout \
        hypothesis einops setuptools wheel ninja cmake nanobind || return 1
    data # needs pyarrow, which the other machine then does without
}

# The sources of a package. pip asks them for their metadata, which they give without a GPU only if nothing is compiled.
download() {
    CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip_ download --no-deps --no-build-isolation \
        --no-binary "${1%%==*}" -d "$2" "$1"
}

# The compute capability of every GPU that torch sees, as TORCH_CUDA_ARCH_LIST wants it.
architectures() {
    "$PYTHON" -c 'import torch
print(" ".join(sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})))'
}

# One nvcc takes about 4 GB.
job_count() {
    local cores memory
    cores=$(nproc)
    memory=$(awk '/MemAvailable/ {print int($2 / 4194304)}' /proc/meminfo)
    local count=$((cores < memory ? cores : memory))
    echo $((count < 1 ? 1 : count > 8 ? 8 : count))
}

build() {
    local lacking options native
    mapfile -t options < <(index_options)
    mapfile -t lacking < <(missing)
    if [ "${#lacking[@]}" -gt 0 ]; then
        pip_ install "${options[@]}" --target "$SITE" --upgrade "${lacking[@]}" || return 1
    fi
    build_native &
    native=$!
    build_kernels
    local status=$?
    wait "$native" || status=1
    return "$status"
}

# The native core, unless it is installed: the trees of a search are C++ beside a GPU too.
build_native() {
    if "$PYTHON" -c 'from crsm import native; import sys; sys.exit(not native.available())' 2>/dev/null; then
        echo "the native core is there"
        return 0
    fi
    cmake_ -S crsm/native -B "$GPU_DIR/native" -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" &&
        cmake_ --build "$GPU_DIR/native" --parallel "$(job_count)"
}

cmake_() { if command -v cmake >/dev/null; then cmake "$@"; else "$PYTHON" -m cmake "$@"; fi; }

build_kernels() {
    if "$PYTHON" -c 'from crsm.kernels import cuda; import sys; sys.exit(cuda.missing() or 0)' 2>/dev/null; then
        echo "causal-conv1d and mamba-ssm are there"
        return 0
    fi
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(architectures)}
    [ -n "$TORCH_CUDA_ARCH_LIST" ] || { echo "torch sees no CUDA device" >&2; return 1; }
    export TORCH_CUDA_ARCH_LIST MAX_JOBS=${MAX_JOBS:-$(job_count)}
    # Never a prebuilt wheel: it was made for another torch.
    export CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE
    # Mamba-1's kernels take many minutes to compile and nothing here needs them: Mamba-2's are compiled by Triton.
    export MAMBA_SKIP_CUDA_BUILD=TRUE
    echo "building for $TORCH_CUDA_ARCH_LIST with $MAX_JOBS jobs"
    local sources=$GPU_DIR/sources
    mkdir -p "$sources"
    for package in "$CAUSAL_CONV1D" "$MAMBA_SSM"; do
        local name=${package%%==*}
        local folder
        folder=$(unpack "$package" "$sources") || { echo "$package: no source package" >&2; return 1; }
        # Its list of chips is fixed, and nvcc would compile for all of them.
        sed -i -E 's/cc_flag\.append\("(-gencode|arch=[^"]*)"\)/pass/' "$folder/setup.py"
        if [ -f "$folder/mamba_ssm/ops/selective_scan_interface.py" ]; then
            sed -i 's/^import selective_scan_cuda$/selective_scan_cuda = None/' \
                "$folder/mamba_ssm/ops/selective_scan_interface.py"
        fi
        pip_ install --no-build-isolation --no-deps --target "$SITE" --upgrade "$folder" || return 1
        echo "$name is built"
    done
    "$PYTHON" -c 'from crsm.kernels import cuda; import sys; sys.exit(cuda.missing() or 0)'
}

# Puts the sources of a package into a folder and prints where they lie.
unpack() {
    local archive name=${1%%==*} version=${1##*==}
    archive=$(find "$PACKAGES" "$2" -maxdepth 1 -name "${name//-/[-_]}-$version.tar.gz" 2>/dev/null | head -n 1)
    if [ -z "$archive" ]; then
        download "$1" "$2" >&2 || return 1
        archive=$(find "$2" -maxdepth 1 -name "${name//-/[-_]}-$version.tar.gz" | head -n 1)
    fi
    [ -n "$archive" ] || return 1
    tar -xzf "$archive" -C "$2" || return 1
    find "$2" -maxdepth 1 -type d -name "${name//-/[-_]}-$version" | head -n 1
}

run_tests() {
    "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py tests/kernels --junitxml "$RESULTS/tests.xml"
}

measure() {
    local quick=()
    if [ "$QUICK" = 1 ]; then quick=(--quick); fi
    "$PYTHON" -m jobs.benchmark_speed "$1" --device "$DEVICE" "${quick[@]}" --json "$RESULTS/speed_$1.json"
}

# Shards of text: the little that ships with the project, unless DATA names others.
data() {
    if [ -f "$DATA/tokenizer.json" ]; then return 0; fi
    local docs='{kind: files, name: docs, path: "docs/*.md", licence: Apache-2.0, valid_share: 0.1}'
    local gsm8k='{kind: traces, name: gsm8k, path: crsm/assets/gsm8k_sample.jsonl, licence: MIT}'
    "$PYTHON" -m jobs.prepare_data --config configs/data/sample.yaml --set "sources=[$docs, $gsm8k]" --serial \
        --output "$DATA"
}

# The config, with the shards, and tiny if asked.
settings() {
    printf '%s\n' --config configs/one_gpu_170m.yaml --set "tokenizer.path=$DATA/tokenizer.json" \
        --set "stage_1.text.shards=$DATA"
    if [ "$QUICK" = 1 ]; then
        local stage
        printf '%s\n' --set "model.backbone={vocab_size: 0, d_model: 32, n_layer: 2, d_state: 16, headdim: 16}" \
            --set "model.backbone.chunk_size=16" --set "model.world_model.read_layers=[0, 1]" \
            --set "model.world_model.width=16" --set "model.world_model.decoder_width=16" --set "model.writer.width=16" \
            --set "stage_1.text.length=64" --set "stage_1.optimizer.accumulate=1" --set "stage_3.problems=6" \
            --set "stage_4.calibration_problems=6" --set "sampling.max_tokens=16" --set "search.simulations=8" \
            --set "train.precision=fp32"
        for stage in 1 2 3 4; do
            printf '%s\n' --set "stage_$stage.steps=6" --set "stage_$stage.batch=4" --set "stage_$stage.log_every=1" \
                --set "stage_$stage.evaluate_problems=6" --set "stage_$stage.optimizer.warmup=1"
        done
    fi
}

# Training beside mamba-ssm; the embedding has the rows of the public checkpoints, whatever the tokenizer.
pair() {
    data || return 1
    local given how=(--set model.backbone.vocab_size=50288 --steps 120 --block 10)
    mapfile -t given < <(settings)
    if [ "$QUICK" = 1 ]; then how=(--steps 4 --block 1); fi
    "$PYTHON" -m jobs.benchmark_training "${given[@]}" "${how[@]}" --device "$DEVICE" --json "$RESULTS/pair.json"
}

train_alone() {
    local given name=$1
    shift
    mapfile -t given < <(settings)
    "$PYTHON" -m jobs.train_alone "${given[@]}" "$@" --storage "$RUNS" --device "$DEVICE" --json "$RESULTS/$name.json"
}

# As many steps as two calls of nine minutes hold, with what else they have to do.
baseline() {
    data || return 1
    local how=(--fill 16.5 --minutes 8.8)
    if [ "$QUICK" = 1 ]; then how=(--minutes 2); fi
    train_alone baseline --stages 1 "${how[@]}"
}

system2() {
    data || return 1
    train_alone system2 --stages 2,3,4 --minutes 7 || return 1
    local checkpoint=$RUNS/one_gpu_170m/stage_4/checkpoint
    if [ ! -d "$checkpoint" ]; then return 0; fi # time was up: call again
    "$PYTHON" -m crsm.cli generate --checkpoint "$checkpoint" --problem path_star --device "$DEVICE" --verbose
}

# stage NAME SECONDS COMMAND...: with its time, a limit, and a log.
stage() {
    local name=$1 limit=$2 started=$SECONDS status watcher
    shift 2
    echo "== $name"
    # A shell function cannot be given to timeout(1): it runs in a process group of its own, which a watcher may end.
    set -m
    "$@" >"$RESULTS/$name.log" 2>&1 &
    local child=$!
    (sleep "$limit" && kill -- "-$child") >/dev/null 2>&1 &
    watcher=$!
    wait "$child"
    status=$?
    kill -- "-$watcher" 2>/dev/null
    wait "$watcher" 2>/dev/null
    set +m
    tail -n 40 "$RESULTS/$name.log"
    echo "== $name: exit status $status, $((SECONDS - started)) s"
    return "$status"
}

failed=0
started=$(mktemp)
[ "$#" -gt 0 ] || set -- build test train decode
for what in "$@"; do
    case $what in
        fetch) stage fetch 600 fetch || failed=1 ;;
        build)
            stage build 300 build || failed=1
            use_native
            ;;
        test) stage test 120 run_tests || failed=1 ;;
        train) stage train 90 measure train || failed=1 ;;
        decode) stage decode 75 measure decode || failed=1 ;;
        device) stage device 270 measure device || failed=1 ;;
        pair) stage pair 300 pair || failed=1 ;;
        baseline) stage baseline 580 baseline || failed=1 ;;
        system2) stage system2 580 system2 || failed=1 ;;
        *)
            echo "stage = '$what'; allowed: fetch, build, test, train, decode, device, pair, baseline, system2" >&2
            exit 2
            ;;
    esac
done
if [ -n "${OUT:-}" ]; then find "$RESULTS" -type f -newer "$started" -exec cp {} "$OUT"/ \;; fi
rm -f "$started"
exit "$failed"
