"""Fixtures of a small kitchen."""

import pytest

from agentrl_envs.alfworld.engine import Game
from agentrl_envs.alfworld.package_data import load_package_data

KITCHEN = """
(define (problem kitchen) (:domain alfred)
 (:objects agent1 - agent
   mug_bar_1 mug_bar_2 knife_bar_1 apple_bar_1 - object
   fridge_bar_1 table_bar_1 table_bar_2 - receptacle
   middle here there - location
   FridgeType TableType MicrowaveType SinkBasinType - rtype
   MugType AppleType KnifeType ButterKnifeType - otype)
 (:init (= (total-cost) 0)
   (atLocation agent1 middle)
   (receptacleAtLocation fridge_bar_1 here) (receptacleType fridge_bar_1 FridgeType) (openable fridge_bar_1)
   (receptacleAtLocation table_bar_1 there) (receptacleType table_bar_1 TableType)
   (receptacleAtLocation table_bar_2 there) (receptacleType table_bar_2 TableType)
   (canContain FridgeType MugType) (canContain TableType MugType) (canContain TableType KnifeType)
   (objectType mug_bar_1 MugType) (pickupable mug_bar_1) (coolable mug_bar_1)
   (inReceptacle mug_bar_1 table_bar_1) (objectAtLocation mug_bar_1 there)
   (objectType mug_bar_2 MugType) (pickupable mug_bar_2) (coolable mug_bar_2)
   (inReceptacle mug_bar_2 fridge_bar_1) (objectAtLocation mug_bar_2 here)
   (objectType knife_bar_1 KnifeType) (pickupable knife_bar_1)
   (inReceptacle knife_bar_1 table_bar_1) (objectAtLocation knife_bar_1 there)
   (objectType apple_bar_1 AppleType) (pickupable apple_bar_1) (sliceable apple_bar_1)
   (inReceptacle apple_bar_1 table_bar_2) (objectAtLocation apple_bar_1 there))
 (:goal (exists (?o - object) (and (objectType ?o MugType) (isCool ?o) (inReceptacle ?o table_bar_1)))))
"""


def make_kitchen(
    problem: str = KITCHEN, sentence: str = "put a cool mug on the table", **kwargs: str
) -> Game:
    data = load_package_data()
    return Game(data.domain, problem, data.grammar.replace("UNKNOWN GOAL", sentence), **kwargs)


@pytest.fixture(scope="session")
def kitchen_problem() -> str:
    return KITCHEN


@pytest.fixture(scope="session")
def kitchen() -> Game:
    return make_kitchen()
