# SPDX-License-Identifier: Apache-2.0
"""
Run a training script with one thing changed: the experiment's controls, which nobody else needs as flags.

    python examples/miniature/train_control.py true_state train_sd3_soar.py FLAGS...
    python examples/miniature/train_control.py sigma_mixture train_sd3_sft.py FLAGS...

`true_state`: SOAR without the rollout. Its end is replaced by the true state at that noise level, so the auxiliary
states have SOAR's noise levels, number and weights, and lie on the ideal path. What is left of SOAR's advantage over
this control is the rollout's.

`sigma_mixture`: SFT whose noise levels are distributed as those of SOAR's states are together: one in seven as SFT's,
the others as the auxiliary ones. It has as few states a step as SFT.
"""

import importlib
import sys
from pathlib import Path

import torch
from diffusers import training_utils


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import soar_utils  # noqa: E402


SHIFT, NUM_SAMPLING_STEPS, AUX_SHARE = 3.0, 40, 6 / 7  # SOAR's defaults, and SD3.5's shift


def true_state():
    """Replace the rollout's end by the ideal state of the same latents and noise."""
    ideal, add_noise = {}, soar_utils.add_noise

    def remember(latents, noise, sigma):
        ideal.update(latents=latents, noise=noise)
        return add_noise(latents, noise, sigma)

    def rollout_step(noisy_latents, velocity, sigma, sigma_next, *unused):
        return add_noise(ideal["latents"], ideal["noise"], sigma_next)

    soar_utils.add_noise, soar_utils.rollout_step = remember, rollout_step


def sigma_mixture():
    """Draw most noise levels as SOAR draws its auxiliary ones: uniform from one sampling step below sigma up to 1."""
    density = training_utils.compute_density_for_timestep_sampling

    def mixture(*inputs, generator=None, **more):
        u = density(*inputs, generator=generator, **more)
        share, place = torch.rand(2, generator=generator)
        if share >= AUX_SHARE:
            return u
        sigma = soar_utils.shift_sigma(u.clamp(soar_utils.U_MIN, 1), SHIFT)
        sigma_next = soar_utils.next_sigma(sigma, NUM_SAMPLING_STEPS, SHIFT)
        return soar_utils.unshift_sigma(sigma_next + place * (1 - sigma_next), SHIFT)

    training_utils.compute_density_for_timestep_sampling = mixture


CONTROLS = {"true_state": true_state, "sigma_mixture": sigma_mixture}


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in CONTROLS or not (ROOT / f"{Path(sys.argv[2]).stem}.py").is_file():
        sys.exit(f"usage: train_control.py {{{','.join(CONTROLS)}}} SCRIPT FLAGS...")
    CONTROLS[sys.argv[1]]()
    script = importlib.import_module(Path(sys.argv[2]).stem)
    sys.argv = sys.argv[2:]  # the model card shows the script's own command
    script.run(script.parse_args())


if __name__ == "__main__":
    main()
