# The README's commands. Everything is installed into a virtual environment under this folder.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
CONSTRAINTS ?= constraints/main.txt
export PYTHONSAFEPATH = 1
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE ?= 1

# The default Linux wheel of torch brings gigabytes of CUDA libraries. Where pip would take them and no NVIDIA driver
# is loaded, uv installs the CPU build instead: it knows PyTorch's own index. CUDA=1 takes whatever pip finds.
CUDA ?=
NVIDIA_DRIVER ?= /proc/driver/nvidia
define install_torch
@if $(PY) -c 'import torch' 2>/dev/null; then :; \
elif [ -z "$(CUDA)" ] && [ ! -e "$(NVIDIA_DRIVER)" ] \
  && $(PY) -m pip install --quiet --dry-run --report - -c $(CONSTRAINTS) torch | grep -q '"name": "nvidia-'; then \
  $(PY) -m pip install --quiet uv \
  && $(PY) -m uv pip install --quiet --python $(PY) --torch-backend cpu -c $(CONSTRAINTS) torch \
  || { echo "The CPU build of torch could not be installed. 'make CUDA=1 ...' takes the default one, gigabytes larger." >&2; exit 1; }; \
else $(PY) -m pip install --quiet -c $(CONSTRAINTS) torch; fi
endef

.PHONY: demo install test test-long lint format types docs clean

# From nothing to a bundle that answers without torch.
demo: $(VENV)/.demo
	$(VENV)/bin/sbs-edge run --out runs/demo

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(install_torch)
	$(PY) -m pip install --quiet -c $(CONSTRAINTS) -e '.[export]'
	touch $@

install: $(VENV)/.dev

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(install_torch)
	$(PY) -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	touch $@ $(VENV)/.demo

# These packages compute and share nothing, so their tests are spread over the cores; servers, benchmarks and Ray want
# every core for themselves and come after. A process with torch in it takes up to a gigabyte: hence the bound.
SPREAD := -n logical --maxprocesses 4 --dist worksteal
APART := tests/data tests/kernels tests/training tests/export tests/runtime tests/teacher
TOGETHER := $(addprefix --ignore=,$(APART))

# The default run: under 12 minutes on two cores. The second call runs the Triton kernels in Triton's interpreter.
test: install
	$(PY) -m pytest --durations=10 -m "not long and not tensorrt" $(SPREAD) $(APART)
	TRITON_INTERPRET=1 $(PY) -m pytest -m "not long" $(SPREAD) tests/kernels
	$(PY) -m pytest --durations=15 -m "not long and not tensorrt" $(TOGETHER)

test-long: install
	$(PY) -m pytest --durations=10 -m "long and not tensorrt" $(SPREAD) $(APART)
	TRITON_INTERPRET=1 $(PY) -m pytest -m long $(SPREAD) tests/kernels
	$(PY) -m pytest --durations=15 -m "long and not tensorrt" $(TOGETHER)

lint: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

format: install
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

types: install
	$(VENV)/bin/mypy

# The documentation, in an environment of its own. Strict: a broken link fails.
$(VENV)/docs/.installed: pyproject.toml
	test -x $(VENV)/docs/bin/python || $(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/docs/bin/python -m pip install --quiet --group docs
	touch $@

docs: $(VENV)/docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict --quiet

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
