"""Every check of the support matrix over every family."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support_matrix import CHECKS, FAMILIES, Case, is_in_transformers

from lowrank_tune.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.model_type)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    if not is_in_transformers(request.param):
        pytest.skip(f"the installed transformers has no {request.param.model_type}")
    found = Case(request.param)
    yield found
    found.place.cleanup()


@pytest.mark.parametrize("name", CHECKS)
def test_the_family_does_what_the_page_states(case: Case, name: str) -> None:
    if name in case.family.refused:
        with pytest.raises(UserError):
            CHECKS[name](case)
    else:
        CHECKS[name](case)
