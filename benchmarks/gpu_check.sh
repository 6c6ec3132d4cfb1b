#!/usr/bin/env bash
# Builds, tests and times the package on a bare CUDA machine, in at most nine minutes and without a network.
#
#   benchmarks/gpu_check.sh [--cpu] [FOLDER]
#
# FOLDER (default: $OUT, then gpu_check/) takes at most eight files:
#   summary.json    every phase: ok, failed, out of time or skipped, and its seconds
#   log.txt         what the phases printed         tests.xml  the tests one by one
#   sanitizer.txt   memcheck and racecheck          distill.json    card of the distilled set
#   profile.json, step.json, compile.json           records of `profile`, the last one with torch.compile, if time is left
# A phase that fails is recorded and the next one starts. --cpu runs what needs no GPU, to try the script itself.
#
# Expected on the machine: Python 3.11 or 3.12, torch 2.11 or later with CUDA, torchvision, nvcc, ninja, pytest, pandas,
# rich. Whatever else is missing comes as wheels from the folder $WHEELS (default: .whl in the repository), installed to
# a temporary folder, not into the machine's Python. Made where there is a network, for the machine's Python, with
#   pip download -d .whl --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
#     "setuptools>=77" wheel hypothesis sortedcontainers safetensors defusedxml openslide-python openslide-bin \
#     tifffile imagecodecs simplejpeg scikit-learn scipy joblib threadpoolctl torchstain==1.4.1
# (leave out what the machine has; other manylinux tags may be needed). Packages that must be compiled there, such as
# stainx, are taken as source archives (.tar.gz) from the same folder. LIMIT=540 is the limit of the whole in seconds;
# PATIENCE=3 multiplies the limit of every phase, for slow machines; ONLY="build tests" runs only these
# and SHAPES=64x64 measures only these patches.
set -u -o pipefail
SHAPES=${SHAPES:-}

CPU=
if [ "${1:-}" = --cpu ]; then CPU=1; shift; fi
REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
RESULTS=${1:-${OUT:-$REPOSITORY/gpu_check}}
mkdir -p "$RESULTS" && RESULTS=$(cd "$RESULTS" && pwd) || exit 2
WHEELS=${WHEELS:-$REPOSITORY/.whl}
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
LOG=$RESULTS/log.txt
PHASES=$WORK/phases.tsv
DEADLINE=$((SECONDS + ${LIMIT:-540}))
DEVICE=cuda; [ -n "$CPU" ] && DEVICE=cpu
: > "$LOG"; : > "$PHASES"; rm -f "$RESULTS"/{summary,profile,step,compile,distill}.json "$RESULTS"/{tests.xml,sanitizer.txt}

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HISTODD_CACHE=$WORK/cache
export PYTHONPATH=$WORK/wheels:$WORK/site
export HISTODD_COMMIT=${HISTODD_COMMIT:-$(git -C "$REPOSITORY" rev-parse HEAD 2> /dev/null)}

record() { printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >> "$PHASES"; printf '%-14s %-12s %4s s  %s\n' "$1" "$2" "$3" "$4"; }

# phase NAME SECONDS COMMAND...: run it for at most so long, and never beyond the deadline of the whole.
phase() {
  local name=$1 limit=$(($2 * ${PATIENCE:-1})) start=$SECONDS left=$((DEADLINE - SECONDS)) code state last; shift 2
  if [ -n "${ONLY:-}" ] && [[ " $ONLY " != *" $name "* ]]; then record "$name" skipped 0 "not asked for"; return; fi
  if [ "$left" -lt 5 ]; then record "$name" skipped 0 "no time left"; return; fi
  [ "$limit" -gt "$left" ] && limit=$left
  printf '\n==== %s: %s\n' "$name" "$*" >> "$LOG"
  timeout --kill-after=5 "$limit" "$@" > "$WORK/output" 2>&1; code=$?
  cat "$WORK/output" >> "$LOG"
  case $code in 0) state=ok ;; 124 | 137) state="out of time" ;; *) state=failed ;; esac
  last=$(grep -v '^[[:space:]]*$' "$WORK/output" | tail -n 1 | sed "s#$RESULTS/##g; s#$WORK/##g" | tr '\t' ' ' | cut -c1-90)
  record "$name" "$state" $((SECONDS - start)) "$last"
  return $code
}

skip() { record "$1" skipped 0 "$2"; }

wheels() {
  shopt -s nullglob
  local found=("$WHEELS"/*.whl)
  if [ ${#found[@]} -eq 0 ]; then echo "no wheels in $WHEELS: the machine's own packages are used"; return; fi
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$WORK/wheels" "${found[@]}" && echo "${#found[@]} wheels"
}

machine() {
  [ -n "$CPU" ] || nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv
  [ -n "$CPU" ] || nvcc --version | tail -n 2
  "$PYTHON" -c 'import platform, torch; print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda, "usable" if torch.cuda.is_available() else "not usable")'
}

build() {
  mkdir -p "$WORK/source"
  cp -r "$REPOSITORY"/{csrc,histodd_bench,baselines,setup.py,pyproject.toml,MANIFEST.in,README.md,LICENSE} "$WORK/source"
  rm -f "$WORK"/source/histodd_bench/_C*
  if [ -z "$CPU" ]; then
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
    export TORCH_CUDA_ARCH_LIST HISTODD_CUDA=1
  else
    export HISTODD_CUDA=0
  fi
  shopt -s nullglob
  local archives=("$WHEELS"/*.tar.gz) peers=
  if [ ${#archives[@]} -gt 0 ] && [ -z "$CPU" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-build-isolation --no-compile --target "$WORK/wheels" "${archives[@]}" \
      > "$WORK/peers.log" 2>&1 & peers=$!
  fi
  HISTODD_EXTENSION=1 "$PYTHON" -m pip install -v --no-index --no-deps --no-build-isolation --no-compile --target "$WORK/site" "$WORK/source" || return
  if [ -n "$peers" ]; then wait "$peers" || { echo "source archives could not be built:"; tail -n 20 "$WORK/peers.log"; }; fi
  cp -r "$REPOSITORY"/{tests,benchmarks,pyproject.toml} "$WORK/run/"
  ldd "$WORK"/site/histodd_bench/_C*.so | grep -E "stdc|gomp|cudart"
  "$PYTHON" -c 'from histodd_bench.ops._extension import build_info; print(build_info())'
}

sanitizer() {  # memcheck or racecheck
  set -o pipefail
  local tool=$1 program
  program=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}/compute-sanitizer 2> /dev/null | head -n 1)
  [ -n "$program" ] || { echo "compute-sanitizer is not installed"; return 1; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 9 --print-limit 50 \
    "$PYTHON" benchmarks/sanitizer_case.py 2>&1 | tee -a "$RESULTS/sanitizer.txt" | tail -n 60
}

profile() {  # FILE SHAPES BACKENDS: every operator, by these backends and the packages that are installed
  local packages
  packages=$("$PYTHON" -c 'from histodd_bench.profile.peers import PACKAGES
print("".join(f",{name}" for name, p in PACKAGES.items() if p.installed and "cuda" in p.devices))') || return
  "$PYTHON" -m histodd_bench profile stain_augment macenko_fit normalise gradient_distance --shapes "$2" --seconds 0.15 \
    --backends "$3$packages" --device cuda --out "$RESULTS/$1.json"
}

distill() {
  "$PYTHON" - "$WORK/patches" << 'PATCHES' || return
import sys
from pathlib import Path
from PIL import Image
from histodd_bench.profile.patches import procedural
for i, patch in enumerate(procedural(240, 64)):
    folder = Path(sys.argv[1], ("first", "second")[i % 2])
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(patch.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
PATCHES
  local width=128 steps=5; [ -n "$CPU" ] && width=16 steps=1
  "$PYTHON" -m histodd_bench distill histodd --dataset imagefolder --data-root "$WORK/patches" --image-size 64 --preset standard \
    --distill-arch convnet-d3:$width --ipc 5 --seeds 1 --stain on --device $DEVICE --out "$WORK/sets" --set pool.networks=2 \
    --set pool.epochs=2 --set histodd.outer_steps=$steps --set histodd.inner_steps=4 || return
  cp "$(ls "$WORK"/sets/sets/*/card.json | head -n 1)" "$RESULTS/distill.json"
}

mkdir -p "$WORK/run" && cd "$WORK/run" || exit 2
export -f wheels machine build sanitizer profile distill
export CPU REPOSITORY RESULTS WHEELS PYTHON WORK DEVICE SHAPES
phase wheels 60 bash -c wheels
phase machine 30 bash -c machine
if ! phase build 200 bash -c build; then
  for name in tests memcheck racecheck profile step distill; do skip $name "the build failed"; done
else
  selected=(-m cuda tests/test_ops_*.py tests/test_profile.py)
  [ -n "$CPU" ] && selected=(-k "not lesser_instruction_sets and not any_input" tests/test_ops_*.py)
  phase tests 110 "$PYTHON" -m pytest -q -p no:cacheprovider --junit-xml "$RESULTS/tests.xml" "${selected[@]}"
  if [ -n "$CPU" ]; then
    skip memcheck "needs a GPU"; skip racecheck "needs a GPU"
    phase kernels 60 "$PYTHON" benchmarks/sanitizer_case.py --cpu
    phase profile 120 "$PYTHON" -m histodd_bench profile stain_augment macenko_fit normalise gradient_distance --quick --shapes 8x64 \
      --seconds 0.1 --backends compiled,reference,loop --device cpu --threads 1 --out "$RESULTS/profile.json"
    phase step 60 "$PYTHON" -m histodd_bench profile step --quick --seconds 0.1 --device cpu --threads 1 --out "$RESULTS/step.json"
  else
    phase profile 160 bash -c 'profile profile "${SHAPES:-64x64,16x256,256x256}" "compiled,reference,plain,loop"'
    phase step 60 "$PYTHON" -m histodd_bench profile step --device cuda --out "$RESULTS/step.json"
    phase memcheck 60 bash -c "sanitizer memcheck"
    phase racecheck 60 bash -c "sanitizer racecheck"
  fi
  phase distill 60 bash -c distill
  [ -n "$CPU" ] || phase compile 120 bash -c 'profile compile 256x256 "compiled,torch.compile,torch.compile of loop"'
fi

echo
"$PYTHON" - "$PHASES" "$RESULTS" << 'SUMMARY'
import json, sys
from pathlib import Path
results = Path(sys.argv[2])
rows = [line.split("\t") for line in Path(sys.argv[1]).read_text().splitlines()]
summary = [{"phase": r[0], "state": r[1], "seconds": int(r[2]), "last_line": r[3]} for r in rows]
(results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
for row in summary:
    print(f"{row['phase']:<10} {row['state']:<12} {row['seconds']:>4} s")
SUMMARY
echo "results in $RESULTS"
! grep -qvP '^[^\t]*\t(ok|skipped)\t' "$PHASES"
