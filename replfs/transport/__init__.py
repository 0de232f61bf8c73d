"""Links between nodes: ZeroMQ's protocol on trio, sessions, heartbeats, CURVE.

`link` dials and sends operations, `listener` receives them and answers. Both stand on what `socket`
promises and `wire` chooses: `direct` speaks the protocol (`zmtp`) itself, `libzmq` has it spoken,
with CURVE (`security`: keys and who may connect).
"""
