#!/usr/bin/env bash
# Set up .venv and run the tests: CPU, no GPU and no hub needed. Arguments go to pytest.
# With --oldest first: in .venv-oldest, with the lowest versions that requirements.txt allows.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv constraints=tests/constraints.txt
if [ "${1-}" = --oldest ]; then
    shift
    venv=.venv-oldest constraints=tests/constraints-oldest.txt
fi
[ -x $venv/bin/python ] || python3 -m venv $venv
# Byte code is made of what is imported, when it is: of all files it takes half of the installation's time.
$venv/bin/pip install --quiet --disable-pip-version-check --no-compile \
    -r requirements.txt -r tests/requirements.txt -c $constraints
# Originals that scores are compared with. They ask for torchvision, which what is compared does not use.
$venv/bin/pip install --quiet --disable-pip-version-check --no-compile --no-deps open_clip_torch==3.3.0 image-reward==1.5
$venv/bin/ruff check .
$venv/bin/ruff format --check .
# At the end stands what was skipped, and why. One thread: the tiny model is faster that way, and the sums of a step have one order.
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $venv/bin/python -m pytest -n 2 --dist worksteal -q -rs "$@"
