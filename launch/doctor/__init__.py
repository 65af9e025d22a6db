"""`tprt doctor`: what a deployment needs of its machine, tried out before anything is loaded.

`examine` starts `runner` and keeps the time; `runner` forks one process for each of `checks`.
"""
