"""What a processor with AMX makes of a teacher in bfloat16: in a step, in a loop, in a cache.

    KERAS_BACKEND=tensorflow taskset -c 0-3 python benchmarks/amx.py [--repeats 5] [--quick]

The goals of `step.py`, `torch_loop.py` and `cache.py` that ask for such a processor, in one run of
a few minutes. It runs on any other as well; the result says which flags the processor has.
"""

import argparse
import pathlib
import tempfile

import cache
import keras
from side_by_side import begin, images, over, save
from step import short_floats
from torch_loop import STEPS, compared


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=6144, help="images that are written")
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    arguments = parser.parse_args()
    started = begin()
    repeats, samples, batch = arguments.repeats, arguments.samples, 128
    widths, base = (16, 32, 64), (40, 84, 168)
    if arguments.quick:
        repeats, samples, batch = 2, 512, 16
        widths, base = (4, 8), (8, 16)
    keras.utils.set_random_seed(0)
    product = short_floats(repeats, 256 if arguments.quick else 2048)
    seconds, said, wide, threads = compared(repeats, widths, base, *images(batch * STEPS))
    x, y = images(samples, cache.CLASSES)
    teacher, costly = cache.costly_teacher(x, y, arguments.quick)
    with tempfile.TemporaryDirectory() as folder:
        written, rows, wrote = cache.writing(pathlib.Path(folder), x, teacher, repeats)

    def ratio(mine, *others, goal):
        return over(seconds[f"Keras, distillation, {mine}"], *map(seconds.get, others), goal=goal)

    peer, loop = "keras.distillation", "PyTorch, distillation"
    fast, auto = 'teacher_precision="bfloat16"', 'teacher_precision="auto"'
    floor = "Keras, student alone", "Keras, teacher forward"
    cost = seconds[floor[1]].processor / seconds[floor[0]].processor
    save(
        "amx",
        started,
        ratios={
            "product of two matrices, bfloat16 / float32": product,
            "logits step / (student step + teacher forward)": ratio(
                "live teacher", *floor, goal=1.05
            ),
            "logits step / keras.distillation": ratio("live teacher", peer, goal=1.0),
            f"logits step, {fast} / keras.distillation": ratio(fast, peer, goal=0.65),
            f"logits step, {auto} / keras.distillation": ratio(auto, peer, goal=0.65),
            f"distillation, {fast} / PyTorch loop": ratio(fast, loop, goal=0.6),
            f"distillation, {auto} / PyTorch loop": ratio(auto, loop, goal=0.6),
            "distillation, cached / PyTorch loop": ratio("cached", loop, goal=0.5),
            **{name: each | {"note": ""} for name, each in written.items()},
        },
        tables=[
            {
                "columns": [f"batches of {batch}", "ms a step", "ms of processor time"],
                "rows": [
                    [name, 1000 * value / STEPS, 1000 * value.processor / STEPS]
                    for name, value in seconds.items()
                ],
            },
            {"columns": [f"{samples:,} images", "s", "s of `predict`"], "rows": rows},
        ],
        notes=[
            f"Teacher {'-'.join(map(str, wide))}, student {'-'.join(map(str, widths))}: a forward "
            f"pass costs {cost:.2f} student steps (1.5 was asked for); PyTorch runs {threads} "
            f"threads. Written are all logits of a teacher of {'-'.join(map(str, costly))}.",
            *(f"`{auto}` said: {each}" for each in said),
            *wrote,
        ],
        quick=arguments.quick,
        backend=keras.config.backend(),
    )


if __name__ == "__main__":
    main()
