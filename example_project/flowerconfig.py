"""Flower's settings: columns that say what each evaluation was about, and how it ended."""

tasks_columns = "name,kwargs,state,result,received,runtime,uuid"
