"""`python -m benchmarks [slug…]`: run all benchmarks, or those of some methods."""

import importlib
import pkgutil
import sys

import benchmarks


def main(slugs: list[str]) -> int:
    known = [
        info.name
        for info in pkgutil.iter_modules(benchmarks.__path__)
        if info.name not in ("__main__", "timing")
    ]
    for slug in slugs or known:
        if slug not in known:
            print(f"no benchmark {slug!r}; there are {', '.join(known)}", file=sys.stderr)
            return 2
        print(f"== {slug}", flush=True)
        importlib.import_module(f"benchmarks.{slug}").main()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
