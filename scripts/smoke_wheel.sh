#!/usr/bin/env bash
# Installs a wheel into an empty environment, away from the sources, and tries it: the version, the native core, an
# answer of nano with its plans, an export that is read again.
#
#   scripts/smoke_wheel.sh dist/crsm-*.whl [PYTHON]
#
#   PYTHON   interpreter of the wheel's version     (default: python3)
#   SITE     a folder whose packages are used beside the environment's own, such as a torch that was built for the
#            machine; it must not hold crsm         (default: none)
set -euo pipefail

wheel=$(realpath "$1")
python=${2:-python3}
constraints=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../constraints.txt")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
bin=$folder/venv/bin

"$python" -m venv "$folder/venv"
if [ -n "${SITE:-}" ]; then
    realpath "$SITE" >"$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
fi
pip_() { "$bin/python" -m pip --disable-pip-version-check -q "$@"; }
# torch goes first and by its exact version, as in `make setup`.
pip_ install "$(grep '^torch==' "$constraints")"
pip_ install -c "$constraints" "$wheel"

cd "$folder"
export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0
"$bin/python" --version
"$bin/crsm" --version
"$bin/python" -c 'import crsm; from crsm import native; assert ".." not in crsm.__file__ and "venv" in crsm.__file__
native.require(); print("native core:", native.describe())'
"$bin/crsm" generate --problem path_star --json generate.json
"$bin/python" - <<'EOF'
import json
results = json.load(open("generate.json"))["results"]
assert results["tokens"] and results["injections"] and results["correct"] is True, results
EOF
"$bin/crsm" export nano exported
"$bin/crsm" generate --checkpoint exported --problem path_star --json exported.json 2>exported.log
"$bin/python" - <<'EOF'
import json
first, second = (json.load(open(name))["results"]["tokens"] for name in ("generate.json", "exported.json"))
assert first == second, (first, second)
EOF
du -sh "$folder/venv" | sed 's/\t.*/ installed/'
echo "$(basename "$wheel"), $(stat -c %s "$wheel") bytes: ok"
