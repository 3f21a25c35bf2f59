-- The steps up to 0024_model_usage
CREATE TABLE commit_count (
  id INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
  commits INTEGER NOT NULL
) STRICT;
CREATE TABLE engine_usage (
  engine TEXT NOT NULL,
  instance TEXT NOT NULL,
  turns INTEGER NOT NULL,
  input_tokens INTEGER NOT NULL,
  cached_input_tokens INTEGER NOT NULL,
  cache_write_input_tokens INTEGER NOT NULL,
  output_tokens INTEGER NOT NULL,
  reasoning_output_tokens INTEGER NOT NULL,
  cost_nanos INTEGER,
  PRIMARY KEY (engine, instance)
) STRICT, WITHOUT ROWID
;
CREATE TABLE instance (
  name TEXT NOT NULL PRIMARY KEY,
  epoch INTEGER NOT NULL CHECK (epoch > 0),
  boot_token TEXT NOT NULL,
  host_id TEXT NOT NULL,
  data_dir TEXT NOT NULL,
  pid INTEGER NOT NULL,
  lease_until INTEGER NOT NULL,
  started_at INTEGER NOT NULL
, lock_id TEXT, time_confirmed_at INTEGER, engines TEXT NOT NULL DEFAULT '[]', max_running INTEGER NOT NULL DEFAULT 0, version TEXT NOT NULL DEFAULT '', stopped_at INTEGER, taken_over_by TEXT, taken_over_at INTEGER, takeover_done_at INTEGER, host_return_until INTEGER) STRICT;
CREATE TABLE instance_epoch (
  name TEXT NOT NULL PRIMARY KEY,
  epoch INTEGER NOT NULL
, boot_token TEXT NOT NULL DEFAULT '') STRICT;
CREATE TABLE interaction (
  run INTEGER NOT NULL,
  no INTEGER NOT NULL,
  kind TEXT NOT NULL,
  prompt TEXT NOT NULL,
  options TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('OPEN', 'ANSWERED', 'DELIVERED', 'CLOSED')),
  asked_at INTEGER NOT NULL,
  replied_at INTEGER,
  response TEXT, wait_deadline_at INTEGER, auto_decided INTEGER NOT NULL DEFAULT 0, tool_call TEXT, replied_by TEXT,
  PRIMARY KEY (run, no)
) STRICT, WITHOUT ROWID;
CREATE TABLE model_usage (
  engine TEXT NOT NULL,
  instance TEXT NOT NULL,
  model TEXT NOT NULL,
  turns INTEGER NOT NULL,
  input_tokens INTEGER NOT NULL,
  cached_input_tokens INTEGER NOT NULL,
  cache_write_input_tokens INTEGER NOT NULL,
  output_tokens INTEGER NOT NULL,
  reasoning_output_tokens INTEGER NOT NULL,
  cost_nanos INTEGER,
  PRIMARY KEY (engine, instance, model)
) STRICT, WITHOUT ROWID
;
CREATE TABLE "process_lease" (
  id INTEGER PRIMARY KEY,
  run INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  turn INTEGER NOT NULL,
  instance TEXT NOT NULL,
  epoch INTEGER NOT NULL,
  host_id TEXT NOT NULL,
  boot_id TEXT NOT NULL,
  pid_namespace INTEGER NOT NULL,
  cookie TEXT NOT NULL,
  watermark INTEGER,
  cgroup TEXT,
  pid INTEGER,
  start_ticks INTEGER,
  state TEXT NOT NULL CHECK (state IN ('INTENT', 'GATED', 'RUNNING', 'KILL_PENDING', 'CLOSED')),
  exit_code INTEGER,
  user_us INTEGER,
  system_us INTEGER,
  max_rss_kib INTEGER,
  ended_by INTEGER,
  processes_ended INTEGER NOT NULL DEFAULT 0,
  created_at INTEGER NOT NULL,
  closed_at INTEGER, orphans TEXT, usage TEXT,
  UNIQUE (run, attempt, turn)
) STRICT;
CREATE TABLE quarantine (
  id INTEGER PRIMARY KEY,
  run INTEGER NOT NULL,
  reconciliation INTEGER NOT NULL,
  reason TEXT NOT NULL,
  detail TEXT NOT NULL,
  quarantined_at INTEGER NOT NULL
) STRICT;
CREATE TABLE reconciliation (
  id INTEGER PRIMARY KEY,
  reconciliation_id TEXT NOT NULL UNIQUE,
  instance TEXT NOT NULL,
  epoch INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('RUNNING', 'COMPLETED', 'FAILED')),
  started_at INTEGER NOT NULL,
  finished_at INTEGER,
  phases TEXT NOT NULL,
  decisions TEXT NOT NULL,
  orphans TEXT NOT NULL,
  bindings TEXT NOT NULL,
  warnings TEXT NOT NULL,
  quarantined INTEGER NOT NULL,
  runs_scanned INTEGER NOT NULL,
  runs_total INTEGER NOT NULL,
  runs_unchanged INTEGER NOT NULL,
  safe_mode INTEGER NOT NULL,
  error TEXT
, cause TEXT NOT NULL DEFAULT 'STARTUP', containment TEXT, trust_removals TEXT, recovered_instance TEXT) STRICT;
CREATE TABLE recovery_event (
  run INTEGER NOT NULL,
  no INTEGER NOT NULL,
  reconciliation INTEGER NOT NULL,
  rule TEXT NOT NULL,
  facts INTEGER NOT NULL,
  status_before TEXT NOT NULL,
  status_after TEXT NOT NULL,
  error_code TEXT,
  recovery_state TEXT NOT NULL,
  recovered_at INTEGER NOT NULL,
  processes_ended INTEGER NOT NULL DEFAULT 0, sequence INTEGER NOT NULL DEFAULT 0, profile TEXT, attempt INTEGER, interaction INTEGER, session_turn INTEGER, session_verdict TEXT, session_reason TEXT, resumes INTEGER, caller TEXT,
  PRIMARY KEY (run, no)
) STRICT, WITHOUT ROWID;
CREATE TABLE removed_part (
  run INTEGER NOT NULL,
  part TEXT NOT NULL,
  PRIMARY KEY (run, part)
) STRICT, WITHOUT ROWID;
CREATE TABLE request_receipt (
  request_id TEXT NOT NULL PRIMARY KEY,
  method TEXT NOT NULL,
  fingerprint TEXT NOT NULL,
  run INTEGER NOT NULL,
  created_at INTEGER NOT NULL
, owner TEXT NOT NULL DEFAULT '') STRICT;
CREATE TABLE run (
  id INTEGER PRIMARY KEY,
  run_id TEXT NOT NULL UNIQUE,
  engine TEXT NOT NULL,
  labels TEXT NOT NULL,
  input TEXT NOT NULL,
  output TEXT,
  status TEXT NOT NULL,
  profile TEXT,
  restart_policy TEXT NOT NULL,
  max_attempts INTEGER NOT NULL,
  attempt INTEGER NOT NULL CHECK (attempt >= 0),
  turn INTEGER NOT NULL CHECK (turn >= 0),
  interaction_count INTEGER NOT NULL CHECK (interaction_count >= 0),
  session_type TEXT,
  session_value TEXT,
  session_turn INTEGER,
  session_verdict TEXT,
  error_code TEXT,
  error_message TEXT,
  cancel_requested_at INTEGER,
  owner TEXT NOT NULL,
  owner_epoch INTEGER NOT NULL,
  version INTEGER NOT NULL,
  queued_at INTEGER NOT NULL,
  created_at INTEGER NOT NULL,
  started_at INTEGER,
  updated_at INTEGER NOT NULL,
  ended_at INTEGER,
  recovery_state TEXT NOT NULL DEFAULT 'NONE',
  recovered_at INTEGER,
  recovery_reason TEXT,
  recovered_version INTEGER,
  recovery_count INTEGER NOT NULL DEFAULT 0,
  reconciliation INTEGER
, event_count INTEGER NOT NULL DEFAULT 1, session_timeout_us INTEGER, require_user_reply INTEGER, max_run_us INTEGER, auto_decided_count INTEGER NOT NULL DEFAULT 0, run_deadline_at INTEGER, reopenable_until INTEGER, retired_type TEXT, retired_value TEXT, wait_due_us INTEGER, run_due_us INTEGER, reopen_due_us INTEGER, due_clock TEXT, session_mark TEXT, session_reason TEXT, max_resumes INTEGER NOT NULL DEFAULT 0, resume_count INTEGER NOT NULL DEFAULT 0, questions_before INTEGER NOT NULL DEFAULT 0, interrupted_at INTEGER, interrupted_by TEXT, resume_at INTEGER, resume_due_us INTEGER, input_tokens INTEGER NOT NULL DEFAULT 0, cached_input_tokens INTEGER NOT NULL DEFAULT 0, cache_write_input_tokens INTEGER NOT NULL DEFAULT 0, output_tokens INTEGER NOT NULL DEFAULT 0, reasoning_output_tokens INTEGER NOT NULL DEFAULT 0, cost_nanos INTEGER, model TEXT, session_usage TEXT, max_tokens INTEGER, max_cost_nanos INTEGER, created_by TEXT, canceled_by TEXT, traceparent TEXT) STRICT;
CREATE TABLE run_event (
  run INTEGER NOT NULL,
  no INTEGER NOT NULL,
  kind TEXT NOT NULL,
  status TEXT NOT NULL,
  attempt INTEGER NOT NULL,
  interaction INTEGER NOT NULL,
  error_code TEXT,
  happened_at INTEGER NOT NULL, usage TEXT, message TEXT, caller TEXT,
  PRIMARY KEY (run, no)
) STRICT, WITHOUT ROWID;
CREATE TABLE run_label (
  key TEXT NOT NULL,
  value TEXT NOT NULL,
  run INTEGER NOT NULL,
  PRIMARY KEY (key, value, run)
) STRICT, WITHOUT ROWID;
CREATE TABLE "schema_migration" ("id" INTEGER NOT NULL PRIMARY KEY, "name" VARCHAR(255) NOT NULL, "applied" DATETIME NOT NULL);
CREATE TABLE store_identity (
  id INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
  store_id TEXT NOT NULL
) STRICT;
CREATE TABLE trust_entry (
  file TEXT NOT NULL,
  folder TEXT NOT NULL,
  place TEXT NOT NULL,
  host_id TEXT NOT NULL,
  cli TEXT NOT NULL,
  run INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  instance TEXT NOT NULL,
  added TEXT NOT NULL,
  created_at INTEGER NOT NULL,
  removed_at INTEGER,
  away TEXT,
  away_since INTEGER,
  look_at INTEGER,
  PRIMARY KEY (file, folder, place)
) STRICT, WITHOUT ROWID;
CREATE TABLE webhook_delivery (
  id INTEGER PRIMARY KEY,
  webhook TEXT NOT NULL,
  instance TEXT NOT NULL,
  run INTEGER NOT NULL,
  run_id TEXT NOT NULL,
  engine TEXT NOT NULL,
  sequence INTEGER NOT NULL,
  event TEXT NOT NULL,
  status TEXT NOT NULL,
  error_code TEXT,
  created_at INTEGER NOT NULL,
  given_up_at INTEGER
) STRICT;
CREATE INDEX interaction_unfinished ON interaction (state, run)
  WHERE state IN ('OPEN', 'ANSWERED');
CREATE INDEX process_lease_closed ON process_lease (instance, closed_at)
  WHERE closed_at IS NOT NULL;
CREATE INDEX process_lease_ended_by ON process_lease (ended_by) WHERE ended_by IS NOT NULL;
CREATE INDEX process_lease_open ON process_lease (instance) WHERE state <> 'CLOSED';
CREATE INDEX quarantine_run ON quarantine (run);
CREATE INDEX recovery_event_feed ON recovery_event (reconciliation, run);
CREATE INDEX request_receipt_created ON request_receipt (created_at)
;
CREATE INDEX run_ended ON run (ended_at, id) WHERE ended_at IS NOT NULL;
CREATE INDEX run_engine ON run (engine, id) WHERE run_id <> '';
CREATE INDEX run_live ON run (owner, id, owner_epoch) WHERE status NOT IN ('CANCELED', 'FAILED', 'SUCCEEDED') AND recovery_state <> 'QUARANTINED';
CREATE INDEX run_queue ON run (owner, queued_at, id)
  WHERE status = 'QUEUED' AND recovery_state <> 'QUARANTINED';
CREATE INDEX run_recovered ON run (recovered_at, id) WHERE recovered_at IS NOT NULL;
CREATE INDEX run_reopen_due ON run (owner, reopen_due_us) WHERE reopen_due_us IS NOT NULL;
CREATE INDEX run_resume_due ON run (owner, resume_due_us) WHERE resume_due_us IS NOT NULL
;
CREATE INDEX run_run_due ON run (owner, run_due_us) WHERE run_due_us IS NOT NULL;
CREATE INDEX run_stale_session ON run (owner)
  WHERE session_value IS NOT NULL AND status IN ('CANCELED', 'FAILED', 'SUCCEEDED');
CREATE INDEX run_wait_due ON run (owner, wait_due_us) WHERE wait_due_us IS NOT NULL;
CREATE UNIQUE INDEX "schema_migration_name" ON "schema_migration" ("name");
CREATE INDEX trust_entry_run ON trust_entry (run);
CREATE INDEX webhook_delivery_age ON webhook_delivery (instance, webhook, created_at)
  WHERE given_up_at IS NULL
;
CREATE INDEX webhook_delivery_due ON webhook_delivery (instance, webhook, run, sequence)
  WHERE given_up_at IS NULL;
CREATE INDEX webhook_delivery_given_up ON webhook_delivery (instance, webhook, given_up_at)
  WHERE given_up_at IS NOT NULL;
INSERT INTO commit_count VALUES (1, 0);
