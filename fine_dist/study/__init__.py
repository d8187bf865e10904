"""Studies: a table of entries x depths x seeds as data, the graph of runs it becomes, and the report of results."""
