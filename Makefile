# Every target sets itself up: Python >= 3.11, make and git are all that it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CODEGEN := .venv-codegen
CODEGEN_READY := $(CODEGEN)/.ready
DEPLOY := .venv-deploy
DEPLOY_READY := $(DEPLOY)/.ready
GENERATED := client/runrecovery/v1
DESCRIPTORS := service/runrecovery_service/rpc/contract.binpb
AGENT_CLIS := .agent-clis
AGENT_CLIS_READY := $(AGENT_CLIS)/.ready
NODE_CLIENT := .node-client
NODE_CLIENT_READY := $(NODE_CLIENT)/.ready
PYTEST_WORKERS ?= 4
CONFIG ?= runrecovery.example.toml
TRIALS ?= 100
MUTANT_TRIALS ?= 5
REPLICA_MUTANTS ?= exists drain renewal
RACE_MUTANTS ?= scan
RACE_RUNS ?= 10000
CALLS ?= 300
FAULT_MUTANTS ?= skipped-records acknowledged-failures open-transactions skipped-decisions one-recovery fatal-renewal internal no-receipts \
	dead-connections forgotten-takes
CUTS ?= 1000
PAIRS ?= 200
KILLS ?= 2000
KILL_MUTANTS ?= early-answer skipped-run
MINUTES ?= 30
PART ?= 1/1
CASES ?= 50000
MUTANT_CASES ?= 3000
ROUNDS ?= 1
HISTORIES ?= 10000
SIMULATION_MUTANTS ?= rearmed slot-early slot-twice orphans gate answer receipts replies launches heartbeats
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo demo-replicas console screenshots test serve proto docs schema verify lint types imports breaking packaging manifests sbom audit bench soak soak-restarts lock clean \
	campaign campaign-crash-points campaign-faults campaign-kills campaign-power-cuts campaign-processes campaign-replicas campaign-simulation explore fuzz mutants interpreters test-agents

help: ## Show these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

$(READY): requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "runrecovery needs Python 3.11 or newer; name one with PYTHON=…")'
	@echo "Setting up $(VENV), once:"
	@echo "  1 of 3: creating the environment"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@echo "  2 of 3: downloading and installing the packages of requirements/dev.txt (400 MB; some 40 s, or minutes on a slow network)"
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/dev.txt
	@echo "  3 of 3: installing runrecovery itself"
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e client -e .
	@touch $@

$(CODEGEN_READY): requirements/codegen.txt
	@rm -rf $(CODEGEN)
	@$(PYTHON) -m venv $(CODEGEN)
	@$(CODEGEN)/bin/python -m pip install --quiet --require-hashes -r requirements/codegen.txt
	@touch $@

$(DEPLOY_READY): requirements/deploy.txt
	@rm -rf $(DEPLOY)
	@$(PYTHON) -m venv $(DEPLOY)
	@$(DEPLOY)/bin/python -m pip install --quiet --require-hashes -r requirements/deploy.txt
	@touch $@

# Without npm there is nothing to install; the tests then say by name what they skip.
$(AGENT_CLIS_READY): tests/cli_agents/npm/package-lock.json
	@mkdir -p $(AGENT_CLIS)
	@cp tests/cli_agents/npm/package.json tests/cli_agents/npm/package-lock.json $(AGENT_CLIS)
	@if command -v npm > /dev/null; then \
		echo "Installing the agent CLIs into $(AGENT_CLIS), once (1.2 GB, minutes)"; \
		cd $(AGENT_CLIS) && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error \
		&& node node_modules/@anthropic-ai/claude-code/install.cjs \
		&& (cd node_modules/claude-code-newest && node install.cjs) && touch .ready; fi

$(NODE_CLIENT_READY): tests/packaging/npm/package-lock.json
	@mkdir -p $(NODE_CLIENT)
	@cp tests/packaging/npm/package.json tests/packaging/npm/package-lock.json $(NODE_CLIENT)
	@if command -v npm > /dev/null; then \
		echo "Installing the Node packages of docs/clients.md and docs/http.md into $(NODE_CLIENT) (once; 80 MB)…"; \
		cd $(NODE_CLIENT) && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error && touch .ready; fi

demo: $(READY) ## Kill a service under nine runs and explain each decision (under a minute)
	@$(BIN)/runrecovery demo
	@echo "Next, in a browser: make console"

demo-replicas: $(READY) ## Kill, freeze and stop three replicas on one PostgreSQL (under a minute)
	@$(BIN)/python -m demo.replicas

console: $(READY) ## Play with the console: answer, kill -9, look (Ctrl-C ends it)
	@$(BIN)/python -m demo.console

screenshots: $(READY) ## Take the pictures of docs/images, with the machine's Chromium
	@$(BIN)/python -m demo.screenshots

test: $(READY) ## Run the tests
	@$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal --ignore=tests/packaging --ignore=tests/cli_agents $(ARGS)

test-agents: $(READY) $(AGENT_CLIS_READY) ## Try the presets with the real CLIs (npm installs them), ROUNDS=1
	@ROUNDS=$(ROUNDS) $(BIN)/python -m pytest -n $(PYTEST_WORKERS) tests/cli_agents $(ARGS)

serve: $(READY) ## Start the service here, with CONFIG=runrecovery.example.toml (Ctrl-C stops it)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/runrecovery serve --config $(CONFIG)

proto: $(CODEGEN_READY) ## Regenerate client/runrecovery/v1 and the served descriptors from proto/
	@rm -rf $(GENERATED)
	@mkdir -p $(GENERATED)
	@PATH="$(CODEGEN)/bin:$$PATH" $(CODEGEN)/bin/python -m grpc_tools.protoc -I proto \
		--python_out=client --grpc_python_out=client --mypy_out=quiet:client --mypy_grpc_out=quiet:client \
		--descriptor_set_out=$(DESCRIPTORS) --include_imports --include_source_info \
		$$(find proto -name '*.proto' | sort)
	@echo '"""Messages and stubs generated from proto/runrecovery/v1 (make proto)."""' > $(GENERATED)/__init__.py

docs: $(READY) ## Regenerate the tables in docs/recovery.md and docs/security.md
	@$(BIN)/python docs/generate.py

schema: $(READY) ## Write what creates a new SQLite store, from the migrations
	@PYTHONPATH=tests $(BIN)/python -m support.new_store

verify: proto docs ## Prove that the generated code and pages are current
	@git diff --exit-code -- $(GENERATED) $(DESCRIPTORS) docs/recovery.md docs/security.md
	@test -z "$$(git ls-files --others --exclude-standard -- $(GENERATED))"

lint: $(READY) ## ruff and buf lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/buf lint

breaking: $(READY) ## Compare the contract with the last released one
	@.ci/breaking $(BIN)/buf

types: $(READY) ## mypy, strict
	@$(BIN)/mypy

imports: $(READY) ## The import rules of the house
	@$(BIN)/lint-imports --no-cache

packaging: $(READY) $(NODE_CLIENT_READY) ## Try the wheels, the client's alone at its oldest and newest dependencies, and docs/clients.md and docs/http.md
	@$(BIN)/python -m pytest tests/packaging

manifests: $(READY) $(DEPLOY_READY) ## Check the files of deploy/: schemas of Kubernetes, stops and names of replicas, systemd
	@.ci/manifests $(DEPLOY)/bin $(BIN)

sbom: $(DEPLOY_READY) ## Write dist/runrecovery.cdx.json, which names every locked dependency of the service
	@mkdir -p dist
	@PYTHONWARNINGS=ignore $(DEPLOY)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
		--output-file dist/runrecovery.cdx.json requirements/service.txt

audit: $(DEPLOY_READY) ## Ask the advisory database about the locked dependencies of the service; needs the internet
	@$(DEPLOY)/bin/pip-audit --require-hashes --disable-pip -r requirements/service.txt

interpreters: $(READY) ## Try every Python >= 3.11 of this machine, and an ordinary user
	@.ci/interpreters

campaign: $(READY) ## Run the long form of every campaign, one after the other; hours
	@.ci/campaign

campaign-kills: $(READY) ## kill -9 a service under load KILLS=2000 times, from a SEED; detect mutants
	@$(BIN)/python tests/campaign/kills.py --kills $(KILLS) $(if $(SEED),--seed $(SEED))
	@$(BIN)/python tests/campaign/kills.py --kills $$(($(KILLS) / 5)) --postgres $(if $(SEED),--seed $(SEED))
	@for mutant in $(KILL_MUTANTS); do \
		$(BIN)/python tests/campaign/kills.py --kills 100 --mutate $$mutant; done

campaign-processes: $(READY) ## Kill services over TRIALS=100 hostile process trees; detect mutants of it
	@$(BIN)/python tests/campaign/processes.py --trials $(TRIALS)
	@for mutant in killpg no-watermark no-recheck close-on-failure; do \
		$(BIN)/python tests/campaign/processes.py --trials $(MUTANT_TRIALS) --mutate $$mutant; done

campaign-replicas: $(READY) ## Break 3 replicas, their network and PostgreSQL under load for SECONDS=60, from a SEED; detect mutants
	@$(BIN)/python tests/campaign/replicas.py --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED))
	@$(BIN)/python tests/campaign/race.py --runs $(RACE_RUNS)
	@for mutant in $(REPLICA_MUTANTS); do \
		$(BIN)/python tests/campaign/replicas.py --seconds 120 --mutate $$mutant; done
	@for mutant in $(RACE_MUTANTS); do $(BIN)/python tests/campaign/race.py --mutate $$mutant; done

campaign-faults: $(READY) ## Fail CALLS=300 database calls on SQLite and on PostgreSQL, from a SEED; detect mutants
	@printf '%s\n' sqlite postgresql | xargs -P 2 -I DATABASE $(BIN)/python tests/faults/database_faults.py \
		--database DATABASE --calls $(CALLS) $(if $(SEED),--seed $(SEED))
	@for mutant in $(FAULT_MUTANTS); do \
		$(BIN)/python tests/faults/database_faults.py --calls 400 --mutate $$mutant; done

campaign-power-cuts: $(READY) ## Cut the power of a recorded service CUTS=1000 times; detect mutants of it
	@$(BIN)/python tests/power_cut/power_cuts.py --cuts $(CUTS) --starts 20
	@for mutant in commits-not-synced never-synced; do \
		$(BIN)/python tests/power_cut/power_cuts.py --cuts 100 --starts 0 --mutate $$mutant; done

campaign-simulation: $(READY) ## Play HISTORIES=10000 seeded histories in virtual time; detect mutants; FIRST=… is the first seed, SEED=… plays one again
	@$(BIN)/python tests/simulation/simulate.py $(if $(SEED),--seed $(SEED),--histories $(HISTORIES) $(if $(FIRST),--first $(FIRST)))
	@$(if $(SEED),,$(if $(SIMULATION_MUTANTS),$(BIN)/python tests/simulation/simulate.py --first 0 $(addprefix --mutate ,$(SIMULATION_MUTANTS))))

campaign-crash-points: $(READY) ## Kill a service at PAIRS=200 pairs of its crash points; detect mutants of it
	@$(BIN)/python tests/crash_points/campaign.py --pairs $(PAIRS) $(if $(SEED),--seed $(SEED))
	@$(BIN)/python tests/crash_points/campaign.py --mutate report-first --mutate close-first --mutate decisions-first --mutate record-late

mutants: $(READY) ## Seed bugs, PART=1/1 of tests/mutants/seeded_bugs.py: the tests must catch each
	@$(BIN)/python tests/mutants/run.py --part $(PART)

fuzz: $(READY) ## Hostile input, CASES=50000, against a real service; detect mutants of it
	@$(BIN)/python tests/fuzz/hostile.py --cases $(CASES)
	@printf '%s\n' unknown writes path handle labels pages verbose roles hoard | xargs -P 2 -I MUTANT sh -c \
		'for seed in 1 2 3; do $(BIN)/python tests/fuzz/hostile.py --mutate MUTANT --seed $$seed --cases $(MUTANT_CASES) && exit; done; exit 1'

explore: $(READY) ## Try 1,000 new random examples of each property (make test: the same 50 each time)
	@$(BIN)/python -m pytest -n $(PYTEST_WORKERS) -m hypothesis --hypothesis-profile=explore --timeout=900 $(ARGS)

soak: $(READY) ## 20,000 runs of 3 years under retention: rows, disk and memory must stay flat
	@$(BIN)/python bench/soak.py --runs 20000 --years 3

soak-restarts: $(READY) ## Restart a service under half load once a minute for MINUTES=30: nothing may grow
	@$(BIN)/python bench/soak_restarts.py --minutes $(MINUTES)

bench: $(READY) ## Short form of every benchmark, as ratios
	@$(BIN)/python bench/recovery.py --runs 20000 --rounds 3
	@$(BIN)/python bench/recovery.py --runs 20000 --rounds 1 --database postgresql
	@$(BIN)/python bench/rpc.py --seconds 3 --rounds 3
	@$(BIN)/python bench/start.py --rounds 5
	@$(BIN)/python bench/processes.py --rounds 3 --trees 50 --launches 2000
	@$(BIN)/python bench/launches.py --rounds 1 --launches 20 --seconds 3
	@$(BIN)/python bench/watch.py --rounds 3 --seconds 1
	@$(BIN)/python bench/sessions.py --files 500 --rounds 3
	@$(BIN)/python bench/replicas.py --rounds 1 --seconds 1
	@$(BIN)/python bench/console.py --runs 20000 --rounds 3 --seconds 1
	@$(BIN)/python bench/memory.py --runs 400 --every 200

lock: $(READY) ## Recompile the hash-pinned requirements
	@for name in codegen service dev deploy client-floor client-latest; do \
		$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-config \
			--custom-compile-command 'make lock' requirements/$$name.in -o requirements/$$name.txt; done

clean: ## Remove what the targets made
	@rm -rf $(VENV) .venv-* $(AGENT_CLIS) $(NODE_CLIENT) dist .mypy_cache .ruff_cache .hypothesis
