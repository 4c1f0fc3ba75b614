"""Trainings in the test process, as in tests/integration."""

from tests.integration.conftest import own_world as own_world
