# Two commands: `make demo` and `make test`. Both set up .venv first and cost under two seconds of that from the second time on.

PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo studio test test-slow exact lint figures setup setup-dev clean

demo: setup  ## train an autoencoder, a VAE and an agent, show what they learnt
	$(RUN) scripts/demo.py

studio:  ## a page in the browser: follow runs, watch agents, sample images
	@$(PYTHON) scripts/bootstrap.py studio
	$(RUN) scripts/studio.py

test: setup-dev  ## the default tests
	$(RUN) -m pytest

test-slow: setup-dev  ## the tests that take minutes
	$(RUN) -m pytest -m slow

exact: setup  ## kill every trainer at random, resume it, compare it byte for byte (half an hour on 2 cores)
	$(RUN) benchmarks/exact.py

lint: setup-dev  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

figures: setup  ## the benchmarks of the README (hours on 2 cores)
	$(RUN) benchmarks/trainer.py
	$(RUN) benchmarks/agents.py
	$(RUN) benchmarks/backbones.py
	$(RUN) scripts/backbones.py --plot docs/backbones.png
	$(RUN) benchmarks/metrics.py
	$(RUN) benchmarks/diffusion.py
	$(RUN) benchmarks/scoreboard.py --train
	$(RUN) benchmarks/studio.py
	$(RUN) benchmarks/sweep.py
	$(RUN) benchmarks/soak.py
	$(RUN) benchmarks/saving.py
	$(RUN) benchmarks/machines.py --rounds 3  # as root
	$(RUN) benchmarks/replay.py
	$(RUN) benchmarks/peers.py
	$(RUN) benchmarks/startup.py
	$(RUN) benchmarks/growth.py
	$(RUN) benchmarks/limits.py
	$(RUN) benchmarks/leaderboard.py

setup:
	@$(PYTHON) scripts/bootstrap.py

setup-dev:
	@$(PYTHON) scripts/bootstrap.py dev

clean:  ## remove .venv (runs are kept)
	rm -rf .venv
