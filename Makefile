# make help lists the targets. Everything works from a fresh clone: the first call brings what the
# machine lacks (.ci/setup), creates .venv and installs the pins of requirements.txt into it.
# PYTHON=/path/to/python3.11 and KV_CHROMIUM=/path/to/chrome name ones that are not on the PATH.
PYTHON ?=
# PyTorch's CPU builds are on an index of their own; only used where plain pip has none.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
AGENTS := $(VENV)/.installed-agents
CONFIG ?= config.yaml

# make run LLM=<folder or hub id> REDIS_URL=redis://... N=<generations> METRICS_PORT=9464
LLM ?=
REDIS_URL ?=
# POLICY=adaptive: TTLs that learn, where the decisions are made; of run, serve and bench formula, of replay lru by default.
POLICY ?=
# INSIDE=1 of run, serve, up and chaos: the decisions are made inside LMCache's server, as config.yaml's inside says
# (chaos: outside by default); INSIDE=adaptive: by a policy that learns; INSIDE=0: by a manager outside.
INSIDE ?=
# make serve HOST=... PORT=8000 LOG=<folder> ATTACH=1 OPTIONS="--max-model-len 4096 --enable-lora"
HOST ?=
PORT ?=
LOG ?=
ATTACH ?=
OPTIONS ?=
QUICK ?=
METRICS_PORT ?=
PERPLEXITY ?= prompt
API_KEY_ENV ?= KV_API_KEY
N ?= 48
SEED ?= 0

# make replay TRACE=<file or folder> POLICY=<name> CAPACITY=<blocks, share, or gpu,disk,remote>
# SET="base_ttl=300 gamma=0" SKIP_BAD=1; what the trace does not say: FORMAT=<name> BLOCK_TOKENS=<tokens>
# TIME_UNIT=<s|ms|us|ns|order> SUBAGENT_TIMES=<absolute|relative> OUTPUT_RATE=<tokens a second>
# make money: the same, with TARIFF=<yaml> MODEL=<a model's config.json, or its folder>
TRACE ?= data/sample_trace.jsonl.gz
CAPACITY ?=
SET ?=
SKIP_BAD ?=
FORMAT ?=
BLOCK_TOKENS ?=
TIME_UNIT ?=
SUBAGENT_TIMES ?=
OUTPUT_RATE ?=
TARIFF ?= data/tariffs.yaml
MODEL ?=

# make tune takes the same; SEED is the search's too, and SET holds settings that are not searched;
# GOAL=<hits|ttft|price|bytes|memory> AGAINST=<another of these> LIMIT=<the worst of that> TRIALS=200
# SPLIT=<share of the time to tune on> PRICES="<of an hour: engine, a GiB in gpu, disk, remote>"
GOAL ?= memory
AGAINST ?=
LIMIT ?=
TRIALS ?= 200
SPLIT ?= 0.5
PRICES ?=

# What each target takes on the command line; anything else is refused by name.
TAKES_run := CONFIG LLM REDIS_URL POLICY INSIDE N SEED METRICS_PORT PERPLEXITY
TAKES_serve := CONFIG LLM REDIS_URL POLICY INSIDE HOST PORT LOG ATTACH OPTIONS API_KEY_ENV
TAKES_up := CONFIG INSIDE
TAKES_show-start := CONFIG LLM OPTIONS
TAKES_down := CONFIG
TAKES_status := CONFIG
TAKES_bench := CONFIG POLICY QUICK
TAKES_bench-overhead := CONFIG
TAKES_bench-gateway := CONFIG
TAKES_bench-inside := QUICK SEED
TAKES_replay := TRACE POLICY CAPACITY SET SKIP_BAD SEED FORMAT BLOCK_TOKENS TIME_UNIT SUBAGENT_TIMES OUTPUT_RATE
TAKES_money := TRACE TARIFF MODEL POLICY CAPACITY SET SKIP_BAD SEED FORMAT BLOCK_TOKENS TIME_UNIT SUBAGENT_TIMES OUTPUT_RATE
TAKES_tune := TRACE POLICY CAPACITY SET SKIP_BAD SEED FORMAT BLOCK_TOKENS TIME_UNIT SUBAGENT_TIMES OUTPUT_RATE GOAL AGAINST LIMIT TRIALS SPLIT PRICES
TAKES_chaos := N SEED INSIDE
TAKES_app := PORT
TAKES_lab := PORT
TAKES_ALL := PY PYTHON TORCH_CPU_INDEX KV_CHROMIUM $(foreach goal,$(MAKECMDGOALS),$(TAKES_$(goal)))
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(word 1,$(origin $(name)))),$(name)))
UNUSED := $(filter-out $(TAKES_ALL) MAKE% -%,$(GIVEN))
ifneq ($(UNUSED),)
$(error make $(or $(MAKECMDGOALS),help) does not use $(UNUSED); \
it takes $(or $(foreach goal,$(MAKECMDGOALS),$(TAKES_$(goal))),no variables))
endif

export PYTHON TORCH_CPU_INDEX
export LMCACHE_TRACK_USAGE := false
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export PYTHONPATH := $(CURDIR)/src

.DEFAULT_GOAL := help
.PHONY: help install install-agents run test up down status notebooks clean-notebooks check-notebooks lint \
	show-start serve bench bench-gateway bench-inside bench-meter bench-overhead bench-sliders replay money tune bench-replay bench-policy app lab \
	demo-model chaos clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# What the wanted targets need of the machine: vLLM's CPU build links libnuma.
NEEDS := $(sort $(if $(filter test notebooks lab run serve bench bench-gateway bench-inside bench-overhead chaos,\
	$(MAKECMDGOALS)),libnuma1) $(if $(filter test bench-sliders,$(MAKECMDGOALS)),chromium) \
	$(if $(filter test chaos,$(MAKECMDGOALS)),redis-server) $(if $(filter test,$(MAKECMDGOALS)),openssl))

# No file: looked at each time, and before anything is installed.
.machine:
	@.ci/setup machine $(NEEDS)

$(READY): requirements.txt pyproject.toml | .machine
	@.ci/setup pins requirements.txt
	@touch $@

# --no-deps: two of these ask for what the rest cannot give; requirements-agents.txt says which.
$(AGENTS): requirements-agents.txt $(READY)
	@.ci/setup pins requirements-agents.txt
	@touch $@

install: $(READY) ## create .venv and install the pinned packages

install-agents: $(AGENTS) ## LangChain, LangGraph and AutoGen for notebook 07 and their tests

# A killed `make` takes what it started with it.
run serve bench bench-gateway bench-inside bench-overhead: export KV_END_WITH_PARENT := 1

run: $(READY) ## real generations, placed across real tiers (LLM= REDIS_URL= POLICY= INSIDE= N= SEED= METRICS_PORT=)
	@$(PY) -m kvttl.session.run --config $(CONFIG) --generations $(N) --seed $(SEED) \
		--perplexity $(PERPLEXITY) $(if $(LLM),--llm '$(LLM)') $(if $(POLICY),--policy '$(POLICY)') \
		$(if $(REDIS_URL),--redis-url '$(REDIS_URL)') $(if $(INSIDE),--inside '$(INSIDE)') \
		$(if $(METRICS_PORT),--metrics-port $(METRICS_PORT))

test: $(AGENTS) ## all tests, on the real stack, notebooks included
	@$(PY) -m pytest

serve: $(READY) ## OpenAI-compatible server, every request managed (LLM= PORT= POLICY= INSIDE= OPTIONS="--max-model-len 4096")
	@$(PY) -m kvttl.serve.gateway --config $(CONFIG) --api-key-env '$(API_KEY_ENV)' \
		$(if $(PORT),--port $(PORT)) $(if $(HOST),--host '$(HOST)') \
		$(if $(LLM),--llm '$(LLM)') $(if $(REDIS_URL),--redis-url '$(REDIS_URL)') \
		$(if $(POLICY),--policy '$(POLICY)') $(if $(INSIDE),--inside '$(INSIDE)') \
		$(if $(LOG),--log '$(LOG)') $(if $(ATTACH),--attach) \
		$(if $(OPTIONS),--server-options="$$OPTIONS")

up: $(READY) ## start coordinator, LMCache server and Redis, and leave them running
	@$(PY) -m kvttl.stack.commands up --config $(CONFIG) $(if $(INSIDE),--inside '$(INSIDE)')

show-start: $(READY) ## what to type for a server that decides inside: three ways, by config.yaml (LLM= OPTIONS=)
	@$(PY) -m kvttl.session.show_start --config $(CONFIG) $(if $(LLM),--llm '$(LLM)') \
		$(if $(OPTIONS),--server-options="$$OPTIONS")

down: $(READY) ## stop what `make up` started
	@$(PY) -m kvttl.stack.commands down --config $(CONFIG)

status: $(READY) ## what is running
	@$(PY) -m kvttl.stack.commands status --config $(CONFIG)

notebooks: $(AGENTS) ## run all notebooks headless, in order
	@$(PY) -m pytest tests/test_notebooks.py -q

# This machine only. Several kernels would share two cores; an idle one is a closed page's.
VOILA := --Voila.ip=127.0.0.1 --show_tracebacks=True --ExecutePreprocessor.timeout=60 \
	--MappingKernelManager.cull_idle_timeout=600 --MappingKernelManager.cull_interval=60 \
	--VoilaConfiguration.file_allowlist=[]
LAB = --ServerApp.ip=127.0.0.1 --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

app: $(READY) ## decisions, replay, tuning and a live server as a page (this machine only; PORT=)
	@env JUPYTER_PREFER_ENV_PATH=1 $(PY) -m voila src/kvttl/sliders/web/page.ipynb $(VOILA) --port=$(or $(PORT),8866)

lab: $(READY) ## JupyterLab on the notebooks (this machine only; PORT=)
	@env JUPYTER_PREFER_ENV_PATH=1 $(PY) -m jupyterlab $(LAB) --ServerApp.port=$(or $(PORT),8888)

clean-notebooks: $(READY) ## strip outputs from the notebooks
	@$(VENV)/bin/nbstripout notebooks/*.ipynb

check-notebooks: $(READY) ## fail if a notebook in git has outputs
	@$(VENV)/bin/nbstripout --verify notebooks/*.ipynb

bench: $(READY) ## the kit beside what people do today, on the real stack, 40 minutes (QUICK=1: 2)
	@$(PY) -m kvttl.bench.speedup --config $(CONFIG) $(if $(POLICY),--policy '$(POLICY)') $(if $(QUICK),--quick --out data/runs/bench-quick)

bench-overhead: $(READY) ## what managing adds to a generation; ends with one line of JSON
	@$(PY) -m kvttl.bench.overhead --config $(CONFIG)

bench-gateway: $(READY) ## what the gateway adds to a request; ends with one line of JSON
	@$(PY) -m kvttl.bench.gateway --config $(CONFIG)

bench-inside: $(READY) ## what the server module refuses beside LMCache's LRU, and its cost; a line of JSON (QUICK=1)
	@PYTHONPATH=src:tests LMCACHE_LOG_LEVEL=ERROR $(PY) -W ignore -m bench_inside --seed $(SEED) $(if $(QUICK),--quick)

bench-meter: $(READY) ## how far the regret meter's sample is off, and what it costs; ends with one line of JSON
	@PYTHONPATH=src:tests $(PY) -m bench_meter

# What `make replay`, `make money` and `make tune` are told of the trace.
ON_TRACE = --trace '$(TRACE)' --capacity '$(CAPACITY)' \
	--seed $(SEED) $(if $(SET),--set $(SET)) $(if $(SKIP_BAD),--skip-bad) \
	$(if $(FORMAT),--format '$(FORMAT)') $(if $(BLOCK_TOKENS),--block-tokens '$(BLOCK_TOKENS)') \
	$(if $(TIME_UNIT),--time-unit '$(TIME_UNIT)') $(if $(OUTPUT_RATE),--output-rate '$(OUTPUT_RATE)') \
	$(if $(SUBAGENT_TIMES),--subagent-times '$(SUBAGENT_TIMES)')

replay: $(READY) ## one policy on a trace; ends with one line of JSON (TRACE= POLICY= CAPACITY= SET= FORMAT= ...)
	@$(PY) -m kvttl.replay.command --policy '$(or $(POLICY),lru)' $(ON_TRACE)

money: $(READY) ## what each TTL would have cost: 5 min, 1 h, 24 h or learned? (TRACE= TARIFF= MODEL= ...)
	@$(PY) -m kvttl.replay.command --policy '$(or $(POLICY),lru)' $(ON_TRACE) --tariff '$(TARIFF)' $(if $(MODEL),--model '$(MODEL)')

tune: $(READY) ## search settings on a trace for a goal; writes data/heuristics.yaml (TRACE= POLICY= CAPACITY= GOAL= ...)
	@$(PY) -m policy_tuning --policy '$(or $(POLICY),heuristic)' $(ON_TRACE) \
		--goal '$(GOAL)' $(if $(AGAINST),--against '$(AGAINST)') $(if $(LIMIT),--limit $(LIMIT)) \
		--trials $(TRIALS) --split $(SPLIT) $(if $(PRICES),--prices $(PRICES))

bench-replay: $(READY) ## accesses per second of the replay engines; ends with one line of JSON
	@$(PY) -m kvttl.bench.replay

bench-policy: $(READY) ## what policies hit, by trace and capacity, and what deciding costs; a line of JSON
	@$(PY) -m kvttl.bench.policy

bench-sliders: $(READY) ## from a slider's step to the new picture in the browser (needs chromium)
	@$(PY) -m kvttl.bench.sliders

demo-model: $(READY) ## train data/demo_model again (about half an hour)
	@$(PY) data/train_demo_model.py

chaos: $(READY) ## seeded faults on a real stack, and what held (N=1000: hours; SEED= of the first 100; INSIDE=1)
	@PYTHONPATH=src:tests $(PY) -m chaos --faults $(if $(filter file,$(origin N)),100,$(N)) --seed $(SEED) \
		$(if $(INSIDE),--inside '$(INSIDE)')

lint: $(READY) ## ruff
	@$(VENV)/bin/ruff check src tests data && $(VENV)/bin/ruff format --check src tests data

clean: ## remove what runs leave behind (not .venv)
	rm -rf cache_warm cache_lmcache run_lmcache test_artifacts .pytest_cache .ruff_cache .hypothesis build src/*.egg-info
