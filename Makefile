SHELL := bash
.DEFAULT_GOAL := help

# real: the tests start a nats-server, a Pulsar and a Prometheus and use them too. none: the embedded lanes alone.
BROKERS ?= real
# What chaos draws its faults from, and for how long.
SEED ?= $(shell echo $$RANDOM)
MINUTES ?= 1

compose := docker compose -f docker-compose.stack.yml
docker_answers := docker info >/dev/null 2>&1
# What must not come in, where cargo-deny is not there to read deny.toml.
refused := openssl|openssl-sys|native-tls|async-std

.PHONY: help run build check test soak chaos bench compare up-stack down-stack health health-nats health-pulsar console

help: ## lists what make can do here
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

run: ## runs the bridge on its embedded lanes; nothing else is needed
	@dev/brokers install protoc
	cargo run --release -- serve

build: ## builds the release binary
	@dev/brokers install protoc
	cargo build --release

check: ## checks format, lints and the rules for dependencies
	@dev/brokers install protoc
	cargo fmt --check
	cargo clippy --all-targets --all-features -- -D warnings
	cargo clippy -- -D warnings
	@if command -v cargo-deny >/dev/null || cargo install --locked --quiet cargo-deny; then \
	  echo 'cargo deny check bans licenses sources'; cargo deny check bans licenses sources; \
	elif ! tree=$$(cargo tree --locked --prefix none --target all); then exit 1; \
	elif grep -E '^($(refused)) ' <<<"$$tree"; then echo 'These dependencies are refused.'; exit 1; \
	else \
	  echo 'cargo-deny could not be installed: only the refused crates were checked, no licenses or sources.'; \
	fi
	@if command -v shellcheck >/dev/null; then echo 'shellcheck dev/brokers dev/compare .ci/run'; shellcheck dev/brokers dev/compare .ci/run; fi

test: ## runs all tests, on the embedded lanes and on real brokers (BROKERS=none leaves those out)
	@dev/brokers install $(if $(filter none,$(BROKERS)),protoc)
	TEST_BROKERS=$(BROKERS) cargo test --all-features
	@if [ $(BROKERS) = none ]; then echo 'Not run, because BROKERS=none: the tests on a real nats-server, Pulsar and Prometheus.'; fi

soak: ## runs all tests with their long rounds
	@dev/brokers install
	SOAK=1 TEST_BROKERS=real cargo test --release --all-features

chaos: ## breaks brokers, network, disk and bridges under load, at random by SEED, for MINUTES
	@dev/brokers install
	SEED=$(SEED) MINUTES=$(MINUTES) TEST_BROKERS=real cargo test --all-features --test it -- --exact chaos::whatever_breaks_every_promise_holds --nocapture

bench: ## measures the hot paths, and both embedded lanes without the bridge
	@dev/brokers install protoc
	cargo bench
	@data=$$(mktemp -d) && trap 'rm -rf "$$data"' EXIT && cargo run --quiet --release -- bench --direct --set "server.data_dir=$$data"

compare: ## measures the durable lane beside Pulsar's own clients, on a Pulsar that it starts
	@dev/compare

up-stack: ## starts the stack in Docker, or only its two brokers where no Docker engine answers
	@if $(docker_answers); then $(compose) up --detach --build --wait; else \
	  echo 'No Docker engine answers; starting the brokers without it.'; dev/brokers up; fi

down-stack: ## stops what up-stack started; the data stays
	@if $(docker_answers); then $(compose) down; fi
	@dev/brokers down

health: ## asks the running bridge how it and its lanes are: 0 well, 1 degraded, 2 down
	@cargo run --quiet --release -- health

console: ## says where the running bridge shows itself to a browser
	@echo 'http://127.0.0.1:8091/ unless server.admin says otherwise'

health-nats: ## asks NATS how it is
	@dev/brokers health nats

health-pulsar: ## asks Pulsar how it is, by writing a message and reading it back
	@dev/brokers health pulsar
