#!/usr/bin/env bash
# Resolves pyproject.toml into the locks: versions and hashes, no addresses.
# Run by `make lock`; arguments go to `uv pip compile` (`make lock ARGS=--upgrade`).
set -euo pipefail
cd "$(dirname "$0")/.."

compile() {
    local lock="requirements/$1.lock"
    shift
    uv pip compile --quiet --no-config --universal --python-version 3.12 \
        --generate-hashes --no-emit-index-url --no-header --no-annotate \
        --output-file "$lock" "$@"
}

# One version of each package everywhere: dev is the largest set and constrains the rest.
compile dev pyproject.toml requirements/installer.in --extra dev "${@}"
compile run pyproject.toml --constraints requirements/dev.lock "${@}"
compile installer requirements/installer.in --constraints requirements/dev.lock "${@}"
compile cuda pyproject.toml --extra cuda --constraints requirements/dev.lock "${@}"
compile aot requirements/aot.in --no-deps --constraints requirements/cuda.lock "${@}"
