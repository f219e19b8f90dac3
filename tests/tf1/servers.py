"""Two workers and a parameter server in one process, which cannot stop a server: run by test_together.py."""

import os
import socket
import threading

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

import bigbatch.tf1 as bb

v1 = tf.compat.v1


def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


cluster = v1.train.ClusterSpec({"ps": [address()], "worker": [address(), address()]})
servers = [v1.train.Server(cluster, job, task) for job, task in (("ps", 0), ("worker", 0), ("worker", 1))]


class Worker:
    def __init__(self, task):
        device = v1.train.replica_device_setter(cluster=cluster, worker_device=f"/job:worker/task:{task}")
        with tf.Graph().as_default() as graph, v1.device(device):
            self.x, self.w = v1.placeholder(tf.float64, []), v1.get_variable("w", initializer=tf.zeros([], tf.float64))
            self.acc = bb.Accumulator(v1.train.GradientDescentOptimizer(1.0), 4)
            self.op = self.acc.minimize(self.x * self.w, items=1)
            self.initializer = v1.global_variables_initializer()
        self.session = v1.Session(servers[1 + task].target, graph=graph)

    def work(self):
        for value in range(40):
            self.session.run(self.op, {self.x: value})


workers = [Worker(0), Worker(1)]
workers[0].session.run(workers[0].initializer)
threads = [threading.Thread(target=worker.work) for worker in workers]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
one = workers[1]
print(*one.session.run([one.w, one.acc.updates, one.acc.pending]), flush=True)
os._exit(0)
