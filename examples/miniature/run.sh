#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The experiment, from nothing to its tables and pictures. Safe to run again: what is there is not done again.
#
#     bash examples/miniature/run.sh quick   # one base, one seed, the main arms
#     bash examples/miniature/run.sh full    # all of it, into examples/miniature/results
#     bash examples/miniature/run.sh large   # the same with a model of 32 million parameters at 64 px, for a GPU
#
# One process a core, with one thread each; WORKERS=4 sets another number.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -x .venv/bin/pip ] || python3 -m venv --clear .venv
.venv/bin/pip install --quiet --disable-pip-version-check \
    -r requirements.txt -r examples/miniature/requirements.txt -c tests/constraints.txt
case ${1:-} in
quick) results=outputs/miniature_quick/results ;;
full) results=examples/miniature/results ;;
large) results=examples/miniature/results_large ;;
*)
    sed -n '4,11p' "$0"
    exit 2
    ;;
esac
.venv/bin/python examples/miniature/experiment.py "$1" ${WORKERS:+--workers "$WORKERS"}
.venv/bin/python examples/miniature/report.py "$results"
echo "Pictures: $results/scores.png, steps.png, gap.png, samples.png"
