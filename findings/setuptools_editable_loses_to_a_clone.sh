#!/usr/bin/env bash
# setuptools 84.2.1, editable installs: a folder in the working directory that has the name of the package,
# such as its clone, is imported in place of the package, although it has no __init__.py.
#
# Where a project has more than one folder at its top, `pip install -e` registers a hook of imports instead
# of a path. Python asks it after sys.path, on which the clone is found as a namespace package: empty, but
# found. A plain install wins, since a package with __init__.py anywhere on sys.path comes before a
# namespace package; so does an editable install whose [tool.distutils.editable_wheel] has mode = "compat",
# which is a path.
#
# Seen with CPython 3.11:
#   editable: None
#   compat: __init__.py
#   plain: __init__.py
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT

mkdir -p colours/colours colours/docs
echo 'RED = 1' > colours/colours/__init__.py
echo 'page = 1' > colours/docs/conf.py
cat > colours/pyproject.toml <<'TOML'
[build-system]
requires = ["setuptools==84.2.1"]
build-backend = "setuptools.build_meta"
[project]
name = "colours"
version = "1"
[tool.setuptools.packages.find]
include = ["colours*"]
TOML
python3 -m venv env

imported() {
  env/bin/python -c 'import colours, os; print(colours.__file__ and os.path.basename(colours.__file__))'
}

seen() {
  env/bin/pip install --quiet --disable-pip-version-check --editable ./colours
  echo "editable: $(imported)"
  printf '[tool.distutils.editable_wheel]\nmode = "compat"\n' >> colours/pyproject.toml
  env/bin/pip install --quiet --disable-pip-version-check --editable ./colours
  echo "compat: $(imported)"
  env/bin/pip uninstall --quiet --yes colours
  env/bin/pip install --quiet --disable-pip-version-check ./colours
  echo "plain: $(imported)"
}

seen 2>/dev/null | tee seen.txt
diff seen.txt - <<'TXT'
editable: None
compat: __init__.py
plain: __init__.py
TXT
