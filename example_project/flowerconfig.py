"""Flower's settings: a tab for goal states, and columns that say what an evaluation was, and how it ended."""

from celery_goalstate.contrib.flower import install

install()
tasks_columns = "name,kwargs,state,result,received,runtime,uuid"
