# `make demo` shows it, `make test` proves it. On Debian and Ubuntu both install what is missing and say so.

CARGO ?= cargo
# Tests that run on both profiles from one source; the first run of them, by `make unit`, is on the embedded one.
ON_BOTH := delivery client_e2e client_repair client_groups client_kill groups groups_kill kill_audit load_groups canary isolation http_accounts \
	http_edge http_key_packages http_keys http_messages http_realms http_stream draining timers private_ca dashboards tracing
# Seconds for each fuzz target of `make fuzz`.
FUZZ_SECONDS ?= 20
# Kafka brokers of `make test-cluster`: 1, or 3 with replication 3 and at least 2 in sync.
BROKERS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo build test test-cluster cluster-if-java compose-check alerts-check interop fmt lint unit doc features wasm deny bench fuzz kill-audit faults tools wasm-target

help:
	@echo "make demo        build, then a narrated conversation through a broker that is killed on the way"
	@echo "make test        everything that CI runs: format, lints, tests, documentation, wasm32, licences, cluster"
	@echo "make test-cluster  the tests on a real Kafka and Cassandra, started for them (Java 17; Maven for the first time)"
	@echo "make interop     fetch an independent implementation of MLS (Node.js 20), for the test that talks to it"
	@echo "make compose-check  docker-compose.yml, read by Docker Compose where it is installed"
	@echo "make alerts-check  when the alerts fire and when not, by promtool where it is installed"
	@echo "make bench       log append, apply, bundle fetch, edge round trip, backlog drain"
	@echo "make kill-audit  200 random kill -9 of a broker under load, every accepted id audited"
	@echo "make faults      every fault of topology/faults on a cluster under load, then 50 random kills in one run; about 25 minutes"
	@echo "make fuzz        every fuzz target for $(FUZZ_SECONDS) s each"

demo: build
	@target/release/sealpost demo

build: tools
	$(CARGO) build --release

test: tools fmt lint interop unit doc features wasm deny compose-check alerts-check cluster-if-java

# A machine without Java can't run Kafka and Cassandra: that is said, and never taken for a pass.
cluster-if-java:
	@if command -v java >/dev/null 2>&1 && command -v mvn >/dev/null 2>&1 && command -v python3 >/dev/null 2>&1; then $(MAKE) test-cluster; \
	else echo "skipped: the tests of the cluster profile, which need Kafka and Cassandra and so Java 17, Maven and Python 3: apt-get install openjdk-17-jre-headless maven python3, then make test-cluster"; fi

fmt:
	$(CARGO) fmt --check

lint: tools
	$(CARGO) clippy --all-targets --all-features -- -D warnings

unit: tools
	$(CARGO) test --all-features

# Compiled first, so that the servers do not wait; brought down whatever happens.
test-cluster: tools
	$(CARGO) test --all-features --test 'cluster_*' $(ON_BOTH:%=--test %) --no-run
	@dir=$$(mktemp -d "$${TMPDIR:-/tmp}/sealpost-cluster.XXXXXX"); \
	trap 'topology/local down --dir "$$dir/secure"; topology/local down --dir "$$dir" && rm -rf "$$dir"' EXIT; trap 'exit 130' INT TERM; \
	topology/local up --dir "$$dir" --brokers $(BROKERS) --only kafka,cassandra && \
	servers=$$(topology/local env --dir "$$dir") && \
	env $$servers $(CARGO) test --all-features --test 'cluster_*' -- --test-threads=1 --nocapture && \
	env $$servers SEALPOST_TEST_PROFILE=cluster SEALPOST_TEST_KILL_ROUNDS=3 $(CARGO) test --all-features $(ON_BOTH:%=--test %) -- --test-threads=3 && \
	topology/local down --dir "$$dir" && \
	topology/local up --dir "$$dir/secure" --only kafka,cassandra --secure && \
	env $$(topology/local env --dir "$$dir/secure") $(CARGO) test --all-features --test cluster_secure -- --test-threads=1 --nocapture

# By the real parser. `COMPOSE` may name one that is not on the path.
compose-check:
	@if [ -n "$(COMPOSE)" ]; then compose="$(COMPOSE)"; \
	elif docker compose version >/dev/null 2>&1; then compose="docker compose"; \
	elif command -v docker-compose >/dev/null 2>&1; then compose="docker-compose"; \
	else \
		echo "skipped: docker-compose.yml, since no compose is here; install docker-compose-v2 or docker-compose, or with Go:"; \
		echo "  GOBIN=DIR go install github.com/docker/compose/v2/cmd@v2.29.7, then make compose-check COMPOSE=DIR/cmd"; \
		exit 0; \
	fi; $$compose -f docker-compose.yml config --quiet && echo "docker-compose.yml is right ($$compose)"

# By Prometheus' own tool. `PROMTOOL` may name one that is not on the path.
PROMTOOL ?= promtool
alerts-check:
	@if command -v "$(PROMTOOL)" >/dev/null 2>&1; then "$(PROMTOOL)" check config topology/prometheus.yml && "$(PROMTOOL)" test rules topology/alerts.test.yml; \
	else echo "skipped: topology/alerts.test.yml, since promtool is not here; install prometheus, or make alerts-check PROMTOOL=FILE"; fi

# An independent implementation of MLS to test against (tests/mls_interop.rs). No lock file: package.json names exact versions.
interop:
	@if command -v npm >/dev/null 2>&1; then \
		[ -d tests/interop/node_modules/ts-mls ] || npm install --prefix tests/interop --no-package-lock --no-audit --no-fund --loglevel=error \
		|| echo "skipped: talking to an independent implementation of MLS, since its npm packages could not be fetched"; \
	else echo "skipped: talking to an independent implementation of MLS, which needs Node.js 20 and npm: apt-get install nodejs npm"; fi

doc: tools
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps --all-features

# Each half of the product builds without the other.
features: tools
	$(CARGO) check --no-default-features --features client
	$(CARGO) check --no-default-features --features server

# The SDK's core has no I/O: a browser SDK can follow.
wasm: tools wasm-target
	$(CARGO) check --target wasm32-unknown-unknown --no-default-features --features client-core

# The advisories come from a Git repository. Where it can't be reached, that is said, and the rest is checked.
deny:
	@if ! $(CARGO) deny --version >/dev/null 2>&1; then \
		echo "skipped: licences, sources and advisories (deny.toml), since cargo-deny is not installed: cargo install --locked cargo-deny"; \
	elif $(CARGO) deny fetch db >/dev/null 2>&1; then $(CARGO) deny check; \
	else \
		echo "NOT checked: advisories, since their database can't be reached; licences, bans and sources are"; \
		$(CARGO) deny check licenses bans sources; \
	fi

bench: tools
	$(CARGO) bench --all-features

kill-audit: tools
	SEALPOST_TEST_KILL_ROUNDS=200 $(CARGO) test --release --all-features --test kill_audit -- --nocapture

# Needs what test-cluster needs; results stay in FAULTS_DIR.
FAULTS_DIR ?= target/faults
faults: build
	topology/faults run all --dir "$(FAULTS_DIR)"
	topology/faults soak --kills 50 --dir "$(FAULTS_DIR)/soak"

# cargo-fuzz needs the compiler's unstable sanitizer flags. RUSTC_BOOTSTRAP allows them to the stable one, so that nobody needs nightly.
fuzz: tools
	@$(CARGO) fuzz --version >/dev/null 2>&1 || { echo "installing cargo-fuzz"; $(CARGO) install --locked cargo-fuzz; }
	@set -e; export RUSTC_BOOTSTRAP=1; for target in $$($(CARGO) fuzz list); do \
		echo "fuzzing $$target for $(FUZZ_SECONDS) s"; \
		$(CARGO) fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=4096; \
	done

# protoc (libsignal's build and ours), a C compiler (ring, SQLite, mimalloc, librdkafka), OpenSSL and zlib (librdkafka).
tools:
	@missing=""; \
	command -v protoc >/dev/null 2>&1 || missing="$$missing protobuf-compiler"; \
	{ command -v cc && command -v make; } >/dev/null 2>&1 || missing="$$missing build-essential"; \
	command -v pkg-config >/dev/null 2>&1 || missing="$$missing pkg-config"; \
	pkg-config --exists openssl 2>/dev/null || missing="$$missing libssl-dev"; \
	pkg-config --exists zlib 2>/dev/null || missing="$$missing zlib1g-dev"; \
	[ -z "$$missing" ] && exit 0; \
	sudo=""; [ "$$(id -u)" = 0 ] || sudo="sudo"; \
	command -v apt-get >/dev/null 2>&1 || { echo "please install:$$missing (this is not a Debian or Ubuntu, so make does not try)"; exit 1; }; \
	echo "installing by apt-get:$$missing"; \
	$$sudo apt-get update -q && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $$missing

wasm-target:
	@if command -v rustup >/dev/null 2>&1; then \
		rustup target list --installed | grep -qx wasm32-unknown-unknown \
		|| { echo "adding the wasm32-unknown-unknown target by rustup"; rustup target add wasm32-unknown-unknown; }; \
	fi
