#!/usr/bin/env python
"""Check the machines of a hostfile before a run: reachable, equal, sharing what they should, fast enough.

  python launch/check_cluster.py --hostfile hostfile --path /shared/data --path /shared/runs
  python launch/check_cluster.py                      (this machine alone)
Run it on the first machine of the hostfile. One line per check: ok, warning (it will run, but perhaps not as meant)
or error (it cannot run). Exit code 0 without errors, else 2.
"""

from lexmae import cli, cluster


def main(argv: list[str] | None = None) -> int:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--hostfile", help="DeepSpeed hostfile")
    parser.add_argument("--path", action="append", default=[], dest="paths", metavar="DIR",
                        help="a folder that every machine must see (data, output); may be given several times")
    parser.add_argument("--master_port", type=int, default=29500, help="the launcher's port on the first machine")
    parser.add_argument("--no-measure", action="store_true", help="skip latency and bandwidth")
    options = parser.parse_args(argv)

    hosts = cluster.read_hostfile(options.hostfile) if options.hostfile else {"localhost": 1}
    remote = cluster.ssh if options.hostfile else cluster.local
    errors = warnings = 0
    for finding in cluster.check(hosts, options.paths, port=options.master_port, remote=remote,
                                 measure=not options.no_measure):
        print(finding, flush=True)
        errors, warnings = errors + (finding.level == "error"), warnings + (finding.level == "warning")
    print(f"{len(hosts)} host(s): {errors} error(s), {warnings} warning(s)")
    return 2 if errors else 0


if __name__ == "__main__":
    cli.run(main)
