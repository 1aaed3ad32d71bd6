-- no-transaction
CREATE INDEX CONCURRENTLY configurations_config_idx ON configurations USING gin (config jsonb_path_ops);
