# SPDX-License-Identifier: Apache-2.0
"""
Write a data set of any of the training scripts' formats as an image folder, or as the JSONL of SOAR's authors.

    python examples/evaluation/convert_jsonl.py --train_data_dir photos --to jsonl --resolution 512 --output_dir out
    python examples/evaluation/convert_jsonl.py --jsonl_path data.jsonl --image_dir images --output_dir out

`jsonl` writes `data.jsonl`, for `--jsonl_path`, and `images/`, for `--image_dir`: each image is named by its MD5, and
`bh` and `bw` are the size to train at: the nearest of the buckets, or without a flag that names buckets, the source's
own where it has them. `image_folder` writes `images/` and `metadata.jsonl`, for `--train_data_dir`. Images are hard
links where they are files, as the scripts follow no link that leads out of the folder; --copy copies them.
"""

import argparse
import sys

from accelerate import PartialState
from data_sets import add_data_arguments, add_output_arguments, check_output_arguments, read_data, write_data_set


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0], allow_abbrev=False)
    add_data_arguments(parser)
    add_output_arguments(parser)
    args = parser.parse_args(input_args)
    check_output_arguments(parser, args)
    PartialState()  # for the log
    rows = read_data(args)
    bad = write_data_set(args, rows)
    print(f"{len(rows) - bad} images in {args.output_dir}, {bad} left out")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
