#!/bin/sh
# What CI runs: build the engine from the committed recipe, hold it against the committed budget.
set -eu
optpass optimize fashion-vit --recipe recipe.toml --samples 500 --seconds 0 --force -o engine
optpass gate engine --budget budget.toml --junit gate.xml "$@"
