-- no-transaction
-- With the application, so that a read by both names is one look-up by whichever index is taken.
CREATE INDEX CONCURRENTLY configurations_name_idx ON configurations (name, application_id);
