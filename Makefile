# make demo: a small SPP-net and its detector, trained and tested in some minutes; and
#   what a pretrained trunk sees on two photographs.
# make test: the whole test suite.        PYTHON=python3.13 make test: on that Python.
# make quick: the layer, windows, the model, one training, one detection: two minutes.
# make notebooks: runs every notebook from top to bottom, as a test.
# make docs: the pages of docs/ as a site, in site/; a broken link is an error.
# make lint: linters and types.           make clean: removes all that these have made.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(filter $(VERSION),3.11 3.12 3.13),)
$(error $(PYTHON) is Python '$(VERSION)'; use 3.11 to 3.13: make PYTHON=python3.12 …)
endif
VENV := .venv-$(VERSION)
RUN := runs/demo
# Those that scikit-learn ships.
PHOTOS = $(VENV)/lib/python$(VERSION)/site-packages/sklearn/datasets/images
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist worksteal
# Which tests `make test` runs, by their markers.
TESTS := not notebook

.PHONY: demo test quick notebooks docs lint clean

demo: $(VENV)/demo
	$(VENV)/bin/python -m sppnet_jax.train --config=configs/digits.py --workdir=$(RUN)
	$(VENV)/bin/python -m sppnet_jax.evaluate --workdir=$(RUN) --protocol=single
	$(VENV)/bin/python -m sppnet_jax.detect train --config=configs/detect_digits.py \
	    --config.network=$(RUN) --workdir=$(RUN)/detect
	$(VENV)/bin/python -m sppnet_jax.detect test --workdir=$(RUN)/detect
	$(VENV)/bin/python -m sppnet_jax.predict --trunk=efficientnet_lite0 --windows \
	    --picture=$(RUN)/photos.png $(PHOTOS)/china.jpg $(PHOTOS)/flower.jpg
	@echo
	@echo "The classifier is in $(RUN): curves in training.png, predictions in"
	@echo "evaluate_single.png, numbers in evaluate_single.json and metrics.jsonl."
	@echo "The detector is in $(RUN)/detect: test/examples.png, test/results.json."
	@echo "What a pretrained trunk sees: $(RUN)/photos_1.png and photos_2.png."

test: $(VENV)/dev
	$(PYTEST) -m "$(TESTS)"

quick: $(VENV)/dev
	$(PYTEST) -m quick

notebooks: $(VENV)/dev
	$(PYTEST) -m notebook

docs: $(VENV)/docs
	$(VENV)/bin/mkdocs build --strict --clean

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/demo: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/demo
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/docs: requirements-docs.txt $(VENV)/demo
	$(VENV)/bin/pip install --quiet -r requirements-docs.txt
	touch $@

clean:
	rm -rf .venv-* .cache runs site build *.egg-info .pytest_cache .ruff_cache .mypy_cache
