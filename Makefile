.PHONY: check test soak wheel types

check:  ## what takes seconds: style, and the import law
	ruff check .
	ruff format --check .
	pytest tests/test_layers.py tests/test_entry_points.py tests/test_docs.py

test:
	pytest -n 2

soak:  ## the long campaigns of faults
	pytest -m soak

wheel:
	rm -rf build dist
	pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

# on the installed wheel, where every room has its own name
types: wheel
	pip install --quiet --no-deps --target build/site dist/*.whl
	cd build/site && mypy --config-file ../../pyproject.toml -p ssld
