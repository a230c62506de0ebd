# SPDX-License-Identifier: Apache-2.0
"""Load a pipeline with what a training run left, all weights of the transformer or a LoRA, and draw with it."""

import math
import os
import warnings
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SD3Transformer2DModel


LORA_FILE = "pytorch_lora_weights.safetensors"


def find_trained(path):
    """
    What a model is, for [`load_trained`].

    Args:
        path (`str` or `pathlib.Path`): Folder that a training run or a pipeline left, or a pipeline's hub id.

    Returns:
        `dict`: `{"transformer": path}`, or `{"lora": path}` for a folder that has no transformer.

    Raises:
        `ValueError`: If it is a folder with neither.
    """
    if not os.path.isdir(path) or any(Path(path, "transformer").glob("*.safetensors")):
        return {"transformer": str(path)}
    if Path(path, LORA_FILE).is_file():
        return {"lora": str(path)}
    raise ValueError(f"neither transformer/*.safetensors nor {LORA_FILE} in that folder")


def load_trained(base, transformer=None, lora=None, lora_scale=1.0, dtype=torch.float32, start_lora=None, **options):
    """
    The pipeline `base`, for inference, with a trained transformer or LoRA in it.

    Args:
        base (`str` or `pathlib.Path`): Hub id or folder of a text-to-image pipeline.
        transformer (`str`, *optional*): Folder or hub id with `transformer/` in it.
        lora (`str`, *optional*): Folder or hub id with `pytorch_lora_weights.safetensors` in it.
        lora_scale (`float`): Of the LoRA's update.
        dtype (`torch.dtype`): Of all weights.
        start_lora (`str`, *optional*): What `lora` was trained on top of: becomes part of the weights before.
        options: Further arguments of `from_pretrained` for `base`; a part that is `None` is not loaded.

    Returns:
        `DiffusionPipeline`: of the class that `base` names.

    Raises:
        `ValueError`: If `base` has no transformer to replace, or the LoRA holds nothing for this pipeline; and
            whatever the libraries raise on files that are missing or broken.
    """
    if transformer is not None:
        config = DiffusionPipeline.load_config(base, revision=options.get("revision"))
        if "transformer" not in config:
            raise ValueError(f"{base} has no transformer that {transformer} could take the place of")
        model_class = getattr(diffusers, config["transformer"][1])
        options["transformer"] = model_class.from_pretrained(
            transformer, subfolder="transformer", dtype=dtype, use_safetensors=True
        )
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=dtype, use_safetensors=True, **options)
    if start_lora is not None:
        pipeline.load_lora_weights(start_lora, weight_name=LORA_FILE, adapter_name="start")
        pipeline.fuse_lora(adapter_names=["start"])
        pipeline.unload_lora_weights()
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name=LORA_FILE, adapter_name="lora")
        if "lora" not in pipeline.get_active_adapters():  # diffusers only logs it, and leaves the base as it is
            raise ValueError(f"{LORA_FILE} of {lora} holds nothing for {type(pipeline).__name__}")
        pipeline.set_adapters("lora", lora_scale)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # a LoRA brings the dropout that it was trained with
    return pipeline


def largest_side(base, transformer=None, revision=None):
    """
    The largest images that a pipeline draws, by the configs alone, which are read as by [`load_trained`].

    Returns:
        `float`: pixels a side that a Stable Diffusion 3 has positions for; infinite for any other pipeline.
    """
    parts = DiffusionPipeline.load_config(base, revision=revision)
    if parts.get("transformer", ["", ""])[1] != "SD3Transformer2DModel":
        return math.inf
    options = {} if transformer else {"revision": revision}
    config = SD3Transformer2DModel.load_config(transformer or base, subfolder="transformer", **options)
    vae = AutoencoderKL.load_config(base, subfolder="vae", revision=revision)
    return config["pos_embed_max_size"] * config["patch_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def draw_images(pipeline, *inputs, **options):
    """
    What a pipeline draws, `list[PIL.Image.Image]`.

    Raises:
        `ValueError`: If its numbers are not finite, which diffusers would draw black.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        try:
            return pipeline(*inputs, **options).images
        except RuntimeWarning:
            raise ValueError("the pipeline predicts numbers that are not finite") from None
