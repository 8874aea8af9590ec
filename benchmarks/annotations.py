"""The share of parameters annotated as `Any`, of this package and of another checkout.

    python benchmarks/annotations.py [--against CHECKOUT] [--worst 10]

Every parameter of every function and method counts, but `self` and `cls`; `Any` is one whose
annotation is `Any` itself or that of `*args` and `**kwargs`. Those that hold it inside, such as
`dict[str, Any]`, are told apart.
"""

import argparse
import ast
import pathlib

HERE = pathlib.Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=pathlib.Path, help="another checkout")
    parser.add_argument("--worst", type=int, default=0, help="modules with the most, to be listed")
    arguments = parser.parse_args()
    for name, checkout in (("this build", HERE), ("before", arguments.against)):
        if checkout is not None:
            tell(name, checkout / "keras_kd", arguments.worst)


def tell(name, package, worst):
    found = {path: counted(path) for path in sorted(package.rglob("*.py"))}
    total, plain, inside = (sum(row[i] for row in found.values()) for i in range(3))
    print(
        f"{name}: {plain} of {total} parameters are Any ({100 * plain / total:.1f} %), "
        f"{inside} more hold it inside ({100 * inside / total:.1f} %)"
    )
    for path, row in sorted(found.items(), key=lambda item: -item[1][1])[:worst]:
        print(f"  {row[1]:4} of {row[0]:4}  {path.relative_to(package.parent)}")


def counted(path):
    """Parameters, those that are Any, and those that hold it inside."""
    total = plain = inside = 0
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        spec = node.args
        parameters = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
        for parameter in parameters:
            if parameter is None or parameter.arg in ("self", "cls"):
                continue
            total += 1
            if parameter.annotation is None:
                continue
            text = ast.unparse(parameter.annotation)
            plain += text == "Any"
            inside += text != "Any" and "Any" in {
                each.id for each in ast.walk(parameter.annotation) if isinstance(each, ast.Name)
            }
    return total, plain, inside


if __name__ == "__main__":
    main()
