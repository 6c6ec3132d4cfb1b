#!/usr/bin/env bash
# Measures what docs/performance.md shows, on a machine that does nothing else, and writes the page.
#
#   benchmarks/record_results.sh [PIECE...]      default: every piece, a minute or two each on 2 cores
#
# Pieces: gradient_distance, step, stain_augment_64, stain_augment_256, fit_64, fit_256, other_shapes. DEVICE (default cpu)
# and THREADS (default: every core) choose the machine's part; records go to benchmarks/results/<FOLDER>/, FOLDER being
# the device's name by default. Commit first: a record names the commit, with + where files differ from it.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DEVICE=${DEVICE:-cpu} THREADS=${THREADS:-$(nproc)}
FOLDER=${FOLDER:-$("$PYTHON" -c 'import sys, torch; from histodd_bench.environment import device_name; from histodd_bench.profile.command import device_folder; print(device_folder({"environment": {"device": device_name(torch.device(sys.argv[1]))}}))' "$DEVICE")}
run() {
  local piece=$1; shift
  "$PYTHON" -m histodd_bench profile "$@" --device "$DEVICE" --threads "$THREADS" --out "benchmarks/results/$FOLDER/$piece.json"
}
for piece in ${@:-gradient_distance step stain_augment_64 stain_augment_256 fit_64 fit_256 other_shapes}; do
  case $piece in
    gradient_distance | step) run "$piece" "$piece" ;;
    stain_augment_64) run "$piece" stain_augment --shapes 64x64 --seconds 0.7 ;;
    stain_augment_256) run "$piece" stain_augment --shapes 16x256 --seconds 0.7 ;;
    fit_64) run "$piece" macenko_fit normalise --shapes 64x64 --seconds 0.7 ;;
    fit_256) run "$piece" macenko_fit normalise --shapes 16x256 --seconds 0.7 ;;
    other_shapes) run "$piece" stain_augment macenko_fit normalise --shapes 256x64,64x224,256x256 --backends compiled,plain,stainx --seconds 0.4 ;;
    *) echo "unknown piece: $piece" >&2; exit 2 ;;
  esac
done
"$PYTHON" benchmarks/performance_page.py
