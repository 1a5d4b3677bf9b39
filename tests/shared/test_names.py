"""Names of sites and of their learners: which belongs to which shows in the name alone."""

from __future__ import annotations

import re

import pytest

from shared.config import SiteConfig, parse
from shared.errors import ConfigError
from shared.names import LONGEST_NAME, PARTICIPANT_NAME, SITE_NAME, by_site, site_of

SITES = ["a", "eu-west", "eu.west_2", "a" * 64]
LEARNERS = ["eu-west~910b", "eu-west~a", "a~.", "a" * 64 + "~" + "-" * 32]
NEITHER = ["", "~", "~a", "eu~", "eu~~a", "eu~a~b", "eu~A", "-eu~a", "eu~a/b", "eu~a\n", "a" * 65, "eu~" + "a" * 33]


@pytest.mark.parametrize("name", SITES)
def test_a_site_is_its_own(name: str) -> None:
    assert re.fullmatch(SITE_NAME, name)
    assert re.fullmatch(PARTICIPANT_NAME, name)
    assert site_of(name) == name


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_belongs_to_the_site_before_the_tilde_and_is_none_itself(name: str) -> None:
    assert re.fullmatch(PARTICIPANT_NAME, name)
    assert not re.fullmatch(SITE_NAME, name)
    assert re.fullmatch(SITE_NAME, site_of(name))
    assert len(name) <= LONGEST_NAME


@pytest.mark.parametrize("name", NEITHER)
def test_what_is_no_name_is_neither(name: str) -> None:
    assert not re.fullmatch(SITE_NAME, name)
    assert not re.fullmatch(PARTICIPANT_NAME, name)


def test_values_are_put_together_by_site() -> None:
    assert by_site({"eu~b": 1, "us": 2, "eu~a": 3, "eu": 4}) == {"eu": [1, 3, 4], "us": [2]}


@pytest.mark.parametrize("name", LEARNERS[:2])
def test_a_config_names_a_site_and_no_learner(name: str) -> None:
    with pytest.raises(ConfigError, match=r"\[site\] name: got"):
        parse(SiteConfig, {"site": {"name": name, "coordinator": "https://c:1"}}, "site.toml")
