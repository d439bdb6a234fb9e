"""All uses of torch's private interfaces in fusion_core, by subject: a new torch release changes these files only.

Imports nothing of fusion_core but its errors. Only `inductor` imports Inductor and Dynamo at once.
"""
