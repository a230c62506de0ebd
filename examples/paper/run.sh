#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The paper's experiment, from data to a report. Safe to run again: what is there is not done again.
#
#     bash examples/paper/run.sh tiny                                        # a toy on a CPU: every stage runs
#     bash examples/paper/run.sh one --data "--train_data_dir my_images"     # one 80 GB GPU, shortened, LoRA
#     bash examples/paper/run.sh full --data "--dataset_name OWNER/NAME"     # the paper's settings
#     bash examples/paper/run.sh full --plan                                 # what it takes, before anything runs
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -x .venv/bin/pip ] || python3 -m venv --clear .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt \
    -r examples/evaluation/requirements.txt -c tests/constraints.txt
exec .venv/bin/python examples/paper/paper.py "$@"
