# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at random moments and started again by the same command ends with the same bits."""

import pytest
from harness import CASES, seeded, torture


@pytest.mark.parametrize("case", CASES)
def test_killed_runs_end_with_the_same_bits(case, pipeline, photos, tmp_path):
    outcome = torture(case, tmp_path, pipeline, photos, kills=2, rng=seeded())
    assert outcome.identical, outcome
    assert outcome.same_losses, outcome
