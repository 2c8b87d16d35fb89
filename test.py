"""Evaluate weights, on one process or many, or measure the speed and size of a network.

python test.py --cfg configs/groupmixformer_small.yaml --data-path DIR --resume FILE     Acc@1 and Acc@5
python test.py --cfg configs/groupmixformer_small.yaml --throughput                      images/s
python test.py --cfg configs/groupmixformer_small.yaml --flops                           FLOPs and parameters
python test.py --cfg configs/groupmixformer_small.yaml --resume FILE --images a.jpg folder/    top-5 of pictures
"""

import tasks
from utils.session import RunFolder, run_script, start_session


def main(run_folder: RunFolder | None = None) -> None:
    tasks.evaluate(start_session(__doc__, tasks.keys_of, run_folder))


if __name__ == "__main__":
    run_script(main)
