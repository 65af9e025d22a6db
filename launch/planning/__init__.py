"""`tprt plan`: what each rank will hold and how long a step will take, without loading anything."""
