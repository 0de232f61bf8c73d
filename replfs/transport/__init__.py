"""Links between nodes: ZeroMQ on trio, sessions, heartbeats, CURVE.

`link` dials and sends operations, `listener` receives them and answers; both stand on `socket`
(one ZeroMQ socket under trio's rules) and `security` (keys and who may connect).
"""
